"""Chain 2 of 5: denoising as DN-DETR's, without negatives, on top of chain 1.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_2_denoising.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from dino.modeling.variants import PositiveDenoising

from .chain_1_static import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising._target_ = PositiveDenoising
model.network.denoising.num_denoising = 100
