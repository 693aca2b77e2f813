"""DINO, Swin-L, 5 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 57.3 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); 57.5 by detrex.
Differs from that run in one thing: the classes are the 80 of the data, not 91 raw ids. The weights are ImageNet-22k's
of 384 pixels. The learning rate falls after 11 epochs. Not trained here.

217,567,964 parameters, 1526.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone.out_indices = [0, 1, 2, 3]
model.network.neck.in_features = ["p0", "p1", "p2", "p3"]
model.network.neck.num_levels = 5
