"""DINO without denoising.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/denoise_none.py \
        --train train.json train --val val.json val
"""

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising.num_denoising = 0
