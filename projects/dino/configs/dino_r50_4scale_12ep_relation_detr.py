"""DINO, ResNet-50, 4 scales, 12 epochs, as Relation-DETR: relations of boxes, fused encoder, hybrid branch, varifocal.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_relation_detr.py \
        --num-gpus 8

Published for this setting: 51.7 AP on COCO val2017, by the authors of Relation-DETR (arXiv 2407.11699). Positions of
two boxes bias attention between their queries from the second decoder layer on; the encoder fuses the states of all its
layers; 1500 further queries in training give every object six; the target of a positive is its IoU. Differs from that
run: positions are encoded with temperature 20 and no offset, not 10000 and -0.5, classes are the 80 of the data, not 91
raw ids, the learning rate falls after 10 epochs there, sampling offsets have a tenth of it there, norms and biases have
weight decay, images without objects are kept, and images of any shapes meet in a batch, not those of like shape. The
learning rate falls after 11 epochs. Not trained here.

48,844,904 parameters, 291.3 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.d2.recipe import add_branch
from dino.layers import VarifocalLoss
from dino.modeling.variants import DeepFusionEncoder, HybridBranch, OneToManyCriterion, RelationDecoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.encoder._target_ = DeepFusionEncoder
model.network.decoder._target_ = RelationDecoder
model.criterion.class_loss = L(VarifocalLoss)()
add_branch(
    model,
    "hybrid",
    L(HybridBranch)(num_queries=1500, num_classes="${....num_classes}", embed_dim="${...neck.out_channels}"),
    L(OneToManyCriterion)(),
)
