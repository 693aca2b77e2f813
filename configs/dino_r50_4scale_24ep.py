"""DINO, ResNet-50, 4 scales, 24 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_24ep.py --num-gpus 8

Published for this setting: 50.4 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. Its settings file is not published. The learning rate falls after 20 epochs (paper, appendix
D.3). Not trained here.

46,884,456 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 24
lr_multiplier.milestones = [20]
