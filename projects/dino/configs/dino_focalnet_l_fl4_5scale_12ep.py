"""DINO, FocalNet-L with 4 focal levels, 5 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_focalnet_l_fl4_5scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=focalnet_large_fl4.ms_in22k.safetensors

Published for this setting: 58.5 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. As there, the last block is left out with a chance of 0.3. There the backbone is
that of FocalNet's authors; here it is timm's, with the same blocks, and a norm after each map as there. The file is
timm's. The learning rate falls after 11 epochs. Not trained here.

228,879,556 parameters, 1469.8 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_focalnet_l_fl4_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.network.neck.num_levels = 5
