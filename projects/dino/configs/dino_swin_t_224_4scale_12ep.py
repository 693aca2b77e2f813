"""DINO, Swin-T, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_swin_t_224_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=swin_tiny_patch4_window7_224.pth

Published for this setting: 51.3 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. That is from ImageNet-1k; from ImageNet-22k weights finetuned on 1k, 52.5. The
learning rate falls after 11 epochs. Not trained here.

48,193,350 parameters, 286.6 G multiply-adds at 800x1280; memory: not measured.
"""

from dino.modeling import Decoder

from ....configs.dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone.pretrain_img_size = 224
model.network.neck.backbone.embed_dim = 96
model.network.neck.backbone.depths = [2, 2, 6, 2]
model.network.neck.backbone.num_heads = [3, 6, 12, 24]
model.network.neck.backbone.window_size = 7
model.network.neck.backbone.drop_path_rate = 0.1
