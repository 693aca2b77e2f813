"""DINO, FocalNet-L with 3 focal levels, 4 scales, 36 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_focalnet_l_fl3_4scale_36ep.py \
        --num-gpus 8 train.init_checkpoint=focalnet_large_fl3.ms_in22k.safetensors

Published for this setting: 58.3 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, norms have weight decay, epochs are counted, not 7,500 iterations, as in the official
program. There the backbone is that of FocalNet's authors; here it is timm's, with the same blocks, and a norm after
each map as there. The file is timm's. Not trained here.

228,352,428 parameters, 918.6 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_focalnet_l_fl3_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 36
lr_multiplier.milestones = [30]
