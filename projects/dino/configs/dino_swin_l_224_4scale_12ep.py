"""DINO, Swin-L with weights of 224 pixels, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_swin_l_224_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=swin_large_patch4_window7_224_22kto1k.pth

Published for this setting: 56.9 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, norms have weight decay, epochs are counted, not 7,500 iterations, as in the official
program. From ImageNet-22k weights finetuned on 1k. Not trained here.

217,784,160 parameters, 929.7 G multiply-adds at 800x1280; memory: not measured.
"""

from dino.modeling import Decoder

from ....configs.dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone.pretrain_img_size = 224
model.network.neck.backbone.window_size = 7
