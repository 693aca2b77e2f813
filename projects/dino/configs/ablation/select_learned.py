"""DINO with learned queries as those of one-stage Deformable DETR: learned boxes and contents, no proposals.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/select_learned.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import LearnedQueries

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = LearnedQueries
