"""DINO, ResNet-50, 4 scales, 12 epochs, with Align-DETR's losses and matching.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_align_detr.py \
        --num-gpus 8

Published for this setting: 50.3 AP on COCO val2017, by the authors of Align-DETR (arXiv 2304.07527). Its class targets
join score and IoU, and every object gets two predictions of the encoder and of each decoder layer but the last, weighed
by their rank. Differs from that run: nothing of the backbone but its stem is frozen there, positions are encoded with
temperature 10000 and offset -0.5, an epoch has 7,500 iterations, 7,393 here, and a crowded image does not take pairs
from the images after it. Inference is that of DINO. Not trained here.

47,650,316 parameters, 275.0 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.layers import IoUAwareLoss
from dino.modeling import Decoder
from dino.modeling.variants import MixedMatchingCriterion

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.criterion._target_ = MixedMatchingCriterion
model.criterion.class_loss = L(IoUAwareLoss)()
model.criterion.matcher.copies_share = 0.5
