"""DINO, ResNet-50, 4 scales, 12 epochs, with Stable-DINO's loss, matching cost and encoder.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_stable_dino.py \
        --num-gpus 8

Published for this setting: 50.4 AP on COCO val2017, by the authors of Stable-DINO (arXiv 2304.04742). Its class targets
are squared IoUs, the matching cost modulates scores by positions, and the encoder fuses the states of all its layers.
Class losses weigh six times, but not those of denoising. Differs from that run: nothing of the backbone but its stem is
frozen there; here res2 is too. Positions are encoded with temperature 20 and no offset, not 10000 and -0.5, norms have
weight decay, images without objects are kept (`dataloader.train.dataset.filter_empty=True` drops them too), images of
any shapes meet in a batch, not wide with wide and tall with tall, epochs have 7,393 iterations, not 7,500, sides are
cut to whole pixels, not rounded, and tokens without an anchor are selected last. Its matching mixes up objects of one
class, see `PositionModulatedMatcher`. The learning rate falls after 11 epochs. Not trained here.

48,109,836 parameters, 287.2 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.layers import LossScaling, SquaredIoULoss
from dino.modeling import Decoder
from dino.modeling.variants import DenseFusionEncoder, PositionModulatedMatcher

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.encoder._target_ = DenseFusionEncoder
model.criterion.matcher._target_ = PositionModulatedMatcher
model.criterion.class_loss = L(SquaredIoULoss)()
model.criterion.class_weight = 6.0
model.criterion = L(LossScaling)(criterion=model.criterion, factors={"loss_ce_dn": 1 / 6})
