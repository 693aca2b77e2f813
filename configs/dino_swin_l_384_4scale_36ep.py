"""DINO, Swin-L, 4 scales, 36 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_4scale_36ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 58.0 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); 58.1 by detrex.
Differs from that run in one thing: the classes are the 80 of the data, not 91 raw ids. The weights are ImageNet-22k's
of 384 pixels. The learning rate falls after 30 epochs (paper, appendix D.3). Not trained here.

217,221,340 parameters, 978.6 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 36
lr_multiplier.milestones = [30]
