"""DINO as Relation-DETR: relations of boxes, fused encoder, hybrid branch, varifocal loss.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/relation_detr.py \
        --train train.json train --val val.json val
"""

from detectron2.config import LazyCall as L

from dino.d2.recipe import add_branch
from dino.layers import VarifocalLoss
from dino.modeling.variants import DeepFusionEncoder, HybridBranch, OneToManyCriterion, RelationDecoder

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.encoder._target_ = DeepFusionEncoder
model.network.decoder._target_ = RelationDecoder
model.criterion.class_loss = L(VarifocalLoss)()
add_branch(
    model,
    "hybrid",
    L(HybridBranch)(num_queries=150, num_classes="${....num_classes}", embed_dim="${...neck.out_channels}"),
    L(OneToManyCriterion)(),
)
