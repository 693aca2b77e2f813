"""DINO with 6 encoder layers.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/encoder_6.py \
        --train train.json train --val val.json val
"""

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.encoder.num_layers = 6
