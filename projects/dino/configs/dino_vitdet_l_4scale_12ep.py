"""DINO, ViTDet-L, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_vitdet_l_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=mae_pretrain_vit_large.pth

Published for this setting: 52.9 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. The weights are MAE's, as there. Images are padded to multiples of 16 pixels;
there, what is over is cut. The rate has no warm-up; there it rises over 250 iterations. The learning rate falls after
11 epochs; there after four fifths of the way (9.6). Not trained here.

326,779,724 parameters, 1658.6 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_vitdet_b_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

backbone = model.network.neck.backbone
backbone.embed_dim, backbone.depth, backbone.num_heads = 1024, 24, 16
backbone.global_blocks = [5, 11, 17, 23]
backbone.drop_path_rate = 0.4
del backbone  # a recipe's names are its keys
