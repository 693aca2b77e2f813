"""DINO, Swin-L, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 56.8 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); 56.9 by detrex.
Differs from that run in two things: the classes are the 80 of the data, not 91 raw ids, and every decoder layer has
its own pair of heads, not one pair for all. The weights are ImageNet-22k's of 384 pixels. Its activations are
computed twice, as in the official program (train.activation_checkpointing). The learning rate falls after 11 epochs.
Not trained here.

217,987,200 parameters, 978.6 G multiply-adds at 800x1280; memory: not measured.
"""

from .common.data import dataloader
from .common.models.dino_swin_l import model
from .common.optim import optimizer
from .common.schedule import lr_multiplier
from .common.train import train

train.activation_checkpointing = ["backbone"]
