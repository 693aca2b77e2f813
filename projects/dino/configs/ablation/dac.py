"""DINO with DAC-DETR's second pass in training, and its losses.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/dac.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.d2.recipe import add_branch
from dino.layers import IoUAwareLoss
from dino.modeling.variants import RankedCriterion, SecondPass, ThresholdMatcher

from .base import dataloader, lr_multiplier, model, optimizer, train

model.criterion.class_loss = L(IoUAwareLoss)()
add_branch(model, "second", L(SecondPass)(), L(RankedCriterion)(matcher=L(ThresholdMatcher)(), objects_factor=3.0))
