"""DINO as Relation-DETR: relations of boxes, fused encoder, hybrid branch, varifocal loss.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/relation_detr.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from detectron2.config import LazyCall as L

from dino.layers import VarifocalLoss
from dino.modeling.variants import (
    Branches,
    CombinedCriterion,
    DeepFusionEncoder,
    HybridBranch,
    OneToManyCriterion,
    RelationDecoder,
)

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.encoder._target_ = DeepFusionEncoder
model.network.decoder._target_ = RelationDecoder
model.network.branches = L(Branches)(
    hybrid=L(HybridBranch)(num_queries=150, num_classes="${....num_classes}", embed_dim="${...neck.out_channels}")
)
model.criterion.class_loss = L(VarifocalLoss)()
model.criterion = L(CombinedCriterion)(
    criterion=model.criterion,
    branches=L(Branches)(
        hybrid=L(OneToManyCriterion)(
            matcher="${...criterion.matcher}",
            class_loss="${...criterion.class_loss}",
            class_weight="${...criterion.class_weight}",
            l1_weight="${...criterion.l1_weight}",
            giou_weight="${...criterion.giou_weight}",
        )
    ),
)
