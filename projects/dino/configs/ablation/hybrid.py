"""DINO with H-DETR's hybrid branch in training.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/hybrid.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from detectron2.config import LazyCall as L

from dino.modeling.variants import Branches, CombinedCriterion, OneToManyCriterion, SharedHybridBranch

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.branches = L(Branches)(hybrid=L(SharedHybridBranch)(num_queries=150, embed_dim="${...neck.out_channels}"))
model.criterion = L(CombinedCriterion)(
    criterion=model.criterion,
    branches=L(Branches)(
        hybrid=L(OneToManyCriterion)(
            matcher="${...criterion.matcher}",
            class_weight="${...criterion.class_weight}",
            l1_weight="${...criterion.l1_weight}",
            giou_weight="${...criterion.giou_weight}",
        )
    ),
)
