"""DINO with a budget of 20 denoising pairs for each image instead of 100.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/denoise_20.py \
        --train train.json train --val val.json val
"""

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising.num_denoising = 20
