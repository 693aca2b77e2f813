"""DINO, ViTDet-B, 4 scales, 50 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_vitdet_b_4scale_50ep.py --num-gpus 8 \
        train.init_checkpoint=mae_pretrain_vit_base.pth

Published for this setting: 55.0 AP on COCO val2017, by detrex. Differs from that run: positions are encoded with
temperature 20 and no offset, not 10000 and -0.5, norms have weight decay, images without objects are kept
(`dataloader.train.dataset.filter_empty=True` drops them too), images of any shapes meet in a batch, not wide with wide
and tall with tall, epochs have 7,393 iterations, not 7,500, sides are cut to whole pixels, not rounded, and tokens
without an anchor are selected last. The weights are MAE's, as there. Images are padded to multiples of 16 pixels;
there, what is over is cut. The rate rises over 250 iterations; there it has no warm-up. The learning rate falls after
40 epochs. Not trained here.

108,154,572 parameters, 677.7 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .dino_vitdet_b_4scale_12ep import dataloader, model, optimizer, train

train.epochs = 50
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[40], num_updates="${train.epochs}"),
    warmup_factor=0.001,
    warmup_length=0.0007,  # 250 iterations of COCO
)
