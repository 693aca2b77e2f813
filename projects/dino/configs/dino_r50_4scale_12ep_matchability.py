"""DINO, ResNet-50, 4 scales, 12 epochs, with DEIM's matchability-aware loss.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_matchability.py \
        --num-gpus 8

Published for this setting: none. DEIM (arXiv 2412.04234) publishes the loss for real-time models only; no published
figure for DINO R50. Differs from dino_r50_4scale_12ep.py in the classification loss, and in a pair of heads for each
decoder layer. DEIM has the mosaics and blends of dino_r50_4scale_12ep_dense_o2o.py beside it. Inference is that of
DINO. Not trained here.

47,650,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.layers import MatchabilityLoss
from dino.modeling import Decoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.criterion.class_loss = L(MatchabilityLoss)()
