"""DINO with DAC-DETR's second pass in training, and its losses.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/dac.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from detectron2.config import LazyCall as L

from dino.layers import IoUAwareLoss
from dino.modeling.variants import Branches, CombinedCriterion, RankedCriterion, SecondPass, ThresholdMatcher

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.branches = L(Branches)(second=L(SecondPass)())
model.criterion.class_loss = L(IoUAwareLoss)()
model.criterion = L(CombinedCriterion)(
    criterion=model.criterion,
    branches=L(Branches)(
        second=L(RankedCriterion)(
            matcher=L(ThresholdMatcher)(),
            class_loss="${...criterion.class_loss}",
            class_weight="${...criterion.class_weight}",
            l1_weight="${...criterion.l1_weight}",
            giou_weight="${...criterion.giou_weight}",
            objects_factor=3.0,
        )
    ),
)
