"""DINO, FocalNet-L with 4 focal levels, 5 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_focalnet_l_fl4_5scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=focalnet_large_fl4.ms_in22k.safetensors

Published for this setting: 58.5 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, norms have weight decay, epochs are counted, not 7,500 iterations, as in the official
program. There the backbone is that of FocalNet's authors; here it is timm's, with the same blocks, and a norm after
each map as there. The file is timm's. Not trained here.

228,879,556 parameters, 1467.4 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_focalnet_l_fl4_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.network.neck.num_levels = 5
