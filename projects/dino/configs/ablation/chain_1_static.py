"""Chain 1 of 5: learned boxes and contents for all images, no denoising, look forward once.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_1_static.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from dino.modeling.variants import LearnedQueries, LookForwardOnce

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = LearnedQueries
model.network.denoising.num_denoising = 0
model.network.decoder._target_ = LookForwardOnce
