"""Chain 1 of 5: like DN-DETR with deformable attention: learned queries, positives only, look forward once.

Denoising has DINO's noise and groups: at most 100 positives for each image.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_1_denoising.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import LearnedQueries, LookForwardOnce, PositiveDenoising

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = LearnedQueries
model.network.denoising._target_ = PositiveDenoising
model.network.decoder._target_ = LookForwardOnce
