"""DINO, Swin-L, 5 scales, 36 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_36ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 58.5 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); also 58.5 by
detrex. Differs from that run in two things: the classes are the 80 of the data, not 91 raw ids, and every decoder
layer has its own pair of heads, not one pair for all. The weights are ImageNet-22k's of 384 pixels. The learning rate
falls after 30 epochs. The epoch of the drop is from memory: no program publishes its configuration. Not trained here.

218,333,824 parameters, 1526.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 36
lr_multiplier.milestones = [30]
