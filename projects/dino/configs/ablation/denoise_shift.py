"""DINO whose negatives are boxes of the object's size, moved aside by one to two half sides.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/denoise_shift.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import ShiftDenoising

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising._target_ = ShiftDenoising
