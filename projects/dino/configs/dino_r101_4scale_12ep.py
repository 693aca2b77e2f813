"""DINO, ResNet-101, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r101_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=resnet101.pth

Published for this setting: 50.0 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. As there, the stem alone is frozen. The file is torchvision's ResNet-101. The
learning rate falls after 11 epochs. Not trained here.

66,590,220 parameters, 353.2 G multiply-adds at 800x1280; memory: not measured.
"""

from dino.modeling import Decoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone.stages.depth = 101
model.network.neck.backbone.freeze_at = 1  # the stem alone, as there
train.init_checkpoint = ""  # Detectron2's own ResNet-101 has its stride elsewhere and reads BGR: not this one
