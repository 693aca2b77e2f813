"""DINO, ViTDet-B, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_vitdet_b_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=mae_pretrain_vit_base.pth

Published for this setting: 50.2 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, norms have weight decay, epochs are counted, not 7,500 iterations, as in the official
program. The weights are MAE's. Not trained here.

108,154,572 parameters, 675.2 G multiply-adds at 800x1280; memory: not measured.
"""

from ....configs.common.data import dataloader
from ....configs.common.models.dino_vitdet_b import model
from ....configs.common.optim import optimizer
from ....configs.common.schedule import lr_multiplier
from ....configs.common.train import train
