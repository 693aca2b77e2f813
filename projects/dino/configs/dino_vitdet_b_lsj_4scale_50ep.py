"""DINO, ViTDet-B, 4 scales, 50 epochs, with large-scale jitter and layer-wise learning rates.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_vitdet_b_lsj_4scale_50ep.py \
        --num-gpus 8 train.init_checkpoint=mae_pretrain_vit_base.pth

Published for this setting: none. Data and rates are those of ViTDet (arXiv 2203.16527), the rest is DINO's. The
weights are MAE's. Not trained here.

108,154,572 parameters, 677.7 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.d2.training.optimizer import layerwise_params

from ....configs.common.data_lsj import dataloader
from .dino_vitdet_b_4scale_50ep import lr_multiplier, model, optimizer, train

optimizer.params = L(layerwise_params)(base_lr="${..lr}", rate=0.7)
