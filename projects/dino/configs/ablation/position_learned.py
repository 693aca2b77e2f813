"""DINO with learned codes of rows and columns in place of the encoder's sines.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/position_learned.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.modeling.variants import LearnedPositionEncoding

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.position_encoding = L(LearnedPositionEncoding)(embed_dim="${..neck.out_channels}")
