"""DINO without encoder layers; positions are added to the features, or nothing would read them.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/encoder_0.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import PlacedEncoder

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.encoder._target_ = PlacedEncoder
model.network.encoder.num_layers = 0
