"""DINO, RegNetX of 4 G multiply-adds, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_regnetx_4gf_4scale_12ep.py \
        --num-gpus 8 train.init_checkpoint=RegNetX-4.0GF_dds_8gpu.pyth

Published for this setting: none. The file is pycls'; it was trained on BGR images and is turned to RGB when
it is loaded. Not trained here.

42,926,892 parameters, 272.8 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.d2.detectron2_backbones import regnet
from dino.modeling import Decoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone = L(regnet)(
    depth=23, w_a=38.65, w_0=96, w_m=2.43, group_width=40, out_features=["s2", "s3", "s4"]
)
train.init_checkpoint = ""
