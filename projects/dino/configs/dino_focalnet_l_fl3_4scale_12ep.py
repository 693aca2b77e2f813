"""DINO, FocalNet-L with 3 focal levels, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_focalnet_l_fl3_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=focalnet_large_fl3.ms_in22k.safetensors

Published for this setting: 57.5 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. As there, the last block is left out with a chance of 0.3. There the backbone is
that of FocalNet's authors; here it is timm's, with the same blocks, and a norm after each map as there. The file is
timm's. The learning rate falls after 11 epochs. Not trained here.

228,352,428 parameters, 921.1 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.modeling import Decoder, TimmBackbone

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone = L(TimmBackbone)(
    name="focalnet_large_fl3",
    out_features=["res3", "res4", "res5"],
    map_norm="LN",
    options={"drop_path_rate": 0.3},  # detrex'; timm's default is 0.1
)
train.init_checkpoint = ""
