"""DINO with H-DETR's hybrid branch in training.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/hybrid.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.d2.recipe import add_branch
from dino.modeling.variants import OneToManyCriterion, SharedHybridBranch

from .base import dataloader, lr_multiplier, model, optimizer, train

add_branch(
    model,
    "hybrid",
    L(SharedHybridBranch)(num_queries=150, embed_dim="${...neck.out_channels}"),
    L(OneToManyCriterion)(),
)
