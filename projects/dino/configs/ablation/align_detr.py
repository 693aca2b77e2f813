"""DINO with Align-DETR's losses and matching.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/align_detr.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.layers import IoUAwareLoss
from dino.modeling.variants import MixedMatchingCriterion

from .base import dataloader, lr_multiplier, model, optimizer, train

model.criterion._target_ = MixedMatchingCriterion
model.criterion.class_loss = L(IoUAwareLoss)()
model.criterion.matcher.copies_share = 0.5
