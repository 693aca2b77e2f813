"""DINO, ResNet-50, 4 scales, 24 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_24ep.py --num-gpus 8

Published for this setting: 50.4 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run in two things: the classes are the 80 of the data, not 91 raw ids, and every decoder layer has its own pair of
heads, not one pair for all. The learning rate falls after 20 epochs. The epoch of the drop is from
memory: no program publishes its configuration. Not trained here.

47,650,316 parameters, 275.0 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 24
lr_multiplier.milestones = [20]
