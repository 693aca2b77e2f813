"""DINO, ConvNeXt-T, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_convnext_t_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=convnext_tiny-983f1562.pth

Published for this setting: 51.4 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. There no block is left out at random; here the last one is with a chance of 0.1, as
in torchvision's ConvNeXt. The learning rate falls after 11 epochs.
From ImageNet-22k weights, 52.4: they are timm's, through L(TimmBackbone)(name="convnext_tiny.fb_in22k_ft_in1k_384").
Not trained here.

48,494,124 parameters, 281.9 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.modeling import Decoder, TorchvisionBackbone

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone = L(TorchvisionBackbone)(
    name="convnext_tiny", out_features=["res3", "res4", "res5"], map_norm="LN"
)
train.init_checkpoint = ""
