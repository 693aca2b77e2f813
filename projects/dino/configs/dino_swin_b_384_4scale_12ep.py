"""DINO, Swin-B, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_swin_b_384_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=swin_base_patch4_window12_384_22kto1k.pth

Published for this setting: 55.8 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, norms have weight decay, epochs are counted, not 7,500 iterations, as in the official
program. From ImageNet-22k weights finetuned on 1k, of 384 pixels. Not trained here.

108,257,476 parameters, 546.9 G multiply-adds at 800x1280; memory: not measured.
"""

from dino.modeling import Decoder

from ....configs.dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone.embed_dim = 128
model.network.neck.backbone.num_heads = [4, 8, 16, 32]
