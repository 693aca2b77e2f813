"""DINO, Swin-L, 5 scales, 36 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_36ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 58.5 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); also 58.5 by
detrex. Differs from that run in one thing: the classes are the 80 of the data, not 91 raw ids. The weights are
ImageNet-22k's of 384 pixels. The learning rate falls after 30 epochs (paper, appendix D.3). Not trained here.

217,567,964 parameters, 1526.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 36
lr_multiplier.milestones = [30]
