"""DINO, ResNet-50, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_12ep.py --num-gpus 8

Published for this setting: 49.0 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. The learning rate falls after 11 epochs. Not trained here.

46,884,456 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from dino.modeling import SharedHeadsDecoder

from .common.data import dataloader
from .common.models.dino_r50 import model
from .common.optim import optimizer
from .common.schedule import lr_multiplier
from .common.train import train

model.network.decoder._target_ = SharedHeadsDecoder
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
