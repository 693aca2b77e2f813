"""DINO, ViTDet-L, 4 scales, 50 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_vitdet_l_4scale_50ep.py --num-gpus 8 \
        train.init_checkpoint=mae_pretrain_vit_large.pth

Published for this setting: 57.5 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, norms have weight decay, epochs are counted, not 7,500 iterations, as in the official
program. The weights are MAE's. The rate rises over 250 iterations and falls after 40 epochs. Not trained here.

326,779,724 parameters, 1656.1 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .dino_vitdet_l_4scale_12ep import dataloader, model, optimizer, train

train.epochs = 50
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[40], num_updates="${train.epochs}"),
    warmup_factor=0.001,
    warmup_length=0.0007,  # 250 iterations of COCO
)
