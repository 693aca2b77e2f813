"""DINO with 1 decoder layer.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/decoder_1.py \
        --train train.json train --val val.json val
"""

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder.num_layers = 1
