"""DINO, Swin-L, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 56.8 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); 56.9 by detrex
(from weights finetuned on ImageNet-1k, with the settings that dino_swin_b_384_4scale_12ep.py names). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. As there, the weights are ImageNet-22k's of 384 pixels, and activations of the backbone are
computed twice (train.activation_checkpointing). The learning rate falls after 11 epochs. Not trained here.

217,221,340 parameters, 981.0 G multiply-adds at 800x1280; memory: not measured.
"""

from dino.modeling import SharedHeadsDecoder

from .common.data import dataloader
from .common.models.dino_swin_l import model
from .common.optim import optimizer
from .common.schedule import lr_multiplier
from .common.train import train

model.network.decoder._target_ = SharedHeadsDecoder
train.activation_checkpointing = ["backbone"]
