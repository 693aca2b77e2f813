"""DINO with 6 decoder layers.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/decoder_6.py \
        --train train.json train --val val.json val
"""

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder.num_layers = 6
