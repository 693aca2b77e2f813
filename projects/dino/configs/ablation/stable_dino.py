"""DINO with Stable-DINO's loss, matching cost and encoder.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/stable_dino.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.layers import LossScaling, SquaredIoULoss
from dino.modeling.variants import DenseFusionEncoder, PositionModulatedMatcher

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.encoder._target_ = DenseFusionEncoder
model.criterion.matcher._target_ = PositionModulatedMatcher
model.criterion.class_loss = L(SquaredIoULoss)()
model.criterion.class_weight = 6.0
model.criterion = L(LossScaling)(criterion=model.criterion, factors={"loss_ce_dn": 1 / 6})
