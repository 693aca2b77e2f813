"""DINO, ResNet-50, 4 scales, 12 epochs, with Align-DETR's losses and matching.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_align_detr.py \
        --num-gpus 8

Published for this setting: 50.3 AP on COCO val2017, by the authors of Align-DETR (arXiv 2304.07527). Its class targets
join score and IoU, and every object gets two predictions of the encoder and of each decoder layer but the last, weighed
by their rank. Differs from that run: nothing of the backbone but its stem is frozen there; here res2 is too. Positions
are encoded with temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are
kept (`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with
wide and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. A crowded image takes no pairs from the images after it, as it does there.
Inference is that of DINO. The learning rate falls after 11 epochs. Not trained here.

47,650,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
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
