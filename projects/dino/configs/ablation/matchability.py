"""DINO with DEIM's matchability-aware loss.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/matchability.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.layers import MatchabilityLoss

from .base import dataloader, lr_multiplier, model, optimizer, train

model.criterion.class_loss = L(MatchabilityLoss)()
