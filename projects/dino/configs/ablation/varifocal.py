"""DINO with varifocal loss: the target of a positive is its IoU.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/varifocal.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.layers import VarifocalLoss

from .base import dataloader, lr_multiplier, model, optimizer, train

model.criterion.class_loss = L(VarifocalLoss)()
