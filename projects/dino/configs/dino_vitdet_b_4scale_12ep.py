"""DINO, ViTDet-B, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_vitdet_b_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=mae_pretrain_vit_base.pth

Published for this setting: 50.2 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. The weights are MAE's, as there. Images are padded to multiples of 16 pixels;
there, what is over is cut. The learning rate falls after 11 epochs. Not trained here.

108,154,572 parameters, 677.7 G multiply-adds at 800x1280; memory: not measured.
"""

from ....configs.common.data import dataloader
from ....configs.common.models.dino_vitdet_b import model
from ....configs.common.optim import optimizer
from ....configs.common.schedule import lr_multiplier
from ....configs.common.train import train
