"""DINO with denoising as DN-DETR's: positives alone, as many of them.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/denoise_positives.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from dino.modeling.variants import PositiveDenoising

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising._target_ = PositiveDenoising
