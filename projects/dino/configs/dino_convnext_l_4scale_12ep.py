"""DINO, ConvNeXt-L, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_convnext_l_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=convnext_large-ea097f82.pth

Published for this setting: 53.4 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. There no block is left out at random; here the last one is with a chance of 0.5, as
in torchvision's ConvNeXt. The learning rate falls after 11 epochs.
From ImageNet-22k weights, 55.5: they are timm's, through L(TimmBackbone)(name="convnext_large.fb_in22k_ft_in1k_384").
Not trained here.

219,019,020 parameters, 894.1 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_convnext_t_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone.name = "convnext_large"
