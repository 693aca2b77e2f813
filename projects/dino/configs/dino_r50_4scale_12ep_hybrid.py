"""DINO, ResNet-50, 4 scales, 12 epochs, with H-DETR's hybrid branch in training.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_hybrid.py \
        --num-gpus 8

Published for this setting: none. H-DETR (arXiv 2207.13080) publishes the branch for Deformable DETR with 300 queries:
48.7 instead of 47.0 AP on COCO val2017. Differs from dino_r50_4scale_12ep.py in 1500 further queries, of which every
object gets six, and in a pair of heads for each decoder layer, as in H-DETR. The queries share the decoder and its
heads, but attend to themselves alone; the encoder has DINO's losses. There, the branch begins at the 301st token, here
at the 901st. Inference is that of DINO. Not trained here.

48,034,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.d2.recipe import add_branch
from dino.modeling import Decoder
from dino.modeling.variants import OneToManyCriterion, SharedHybridBranch

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
add_branch(
    model,
    "hybrid",
    L(SharedHybridBranch)(num_queries=1500, embed_dim="${...neck.out_channels}"),
    L(OneToManyCriterion)(),
)
