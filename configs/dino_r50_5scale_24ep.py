"""DINO, ResNet-50, 5 scales, 24 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_5scale_24ep.py --num-gpus 8

Published for this setting: 51.3 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run in one thing: the classes are the 80 of the data, not 91 raw ids. The learning rate falls after 20 epochs (paper,
appendix D.3). Not trained here.

47,247,080 parameters, 823.8 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 24
lr_multiplier.milestones = [20]
