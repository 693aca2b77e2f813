"""DINO with static queries as those of DETR and DAB-DETR: learned boxes, contents of zeros, no proposals.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/select_static.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import LearnedAnchors

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = LearnedAnchors
