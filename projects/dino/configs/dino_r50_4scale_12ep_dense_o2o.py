"""DINO, ResNet-50, 4 scales, 12 epochs, with DEIM's Dense O2O: mosaics of four images and blends of two.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_dense_o2o.py \
        --num-gpus 8

Published for this setting: none. DEIM (arXiv 2412.04234) publishes it for real-time models only; no published figure
for DINO R50. Differs from dino_r50_4scale_12ep.py in the training images: half of them are mosaics and half are blends,
independently, from the second epoch to the seventh; the first and the last five have none. These shares of the training
are DEIM's: from 4 to 29 of about 50 epochs. A mosaic's images have a short side of 400 pixels, half of DINO's 800, as
DEIM's have half of its 640. Each decoder layer has its own pair of heads; else, weights and network are those of DINO,
and so is inference. Not trained here.

47,650,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.d2.combining_mapper import CombiningMapper
from dino.data.mixing import MixUp, Mosaic
from dino.modeling import Decoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
dataloader.train.mapper = L(CombiningMapper)(
    augmentations=dataloader.train.mapper.augmentations,
    mosaic=L(Mosaic)(probability=0.5, side=400, max_size=800, rotation=10.0, translation=0.1, scale=[0.5, 1.5]),
    mixup=L(MixUp)(probability=0.5, ratio=[0.45, 0.55]),
    begin=1 / 12,
    end=7 / 12,
    max_iter="${train.max_iter}",
)
