"""DINO, ResNet-50, 4 scales, 12 epochs, with varifocal loss: the target of a positive is its IoU.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_varifocal.py \
        --num-gpus 8

Published for this setting: none. Differs from dino_r50_4scale_12ep.py in the classification loss, which is that of
VarifocalNet (arXiv 2008.13367) without the gradient of its weights, as in RT-DETR, and in a pair of heads for each
decoder layer. Relation-DETR has both too, see dino_r50_4scale_12ep_relation_detr.py. Inference is that of DINO. Not
trained here.

47,650,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.layers import VarifocalLoss
from dino.modeling import Decoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.criterion.class_loss = L(VarifocalLoss)()
