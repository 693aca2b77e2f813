"""DINO for tens to a thousand pictures and random weights: ResNet-18 with trainable norms, 3 + 3 layers of width 128.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r18_small_data.py \
        --train train.json images --val val.json images \
        train.output_dir=output/mine

`dino_efficientnet_lite0_small_data` is the same from ImageNet weights. Differs from the paper's DINO: queries are
distinct (`DistinctSelection`), class targets are squared IoUs and matching modulates scores by positions (Stable-DINO),
half of the images are enlarged or shrunk, and averaged weights are kept. Its length is a number of iterations, because
few pictures need more epochs than many.

Pictures without an up and a down, such as those of microscopes, want vertical flips too:
`dataloader.train.mapper.augmentations.1.prob=0.5`.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dino.d2.data_loading import OneOf, ShortSide
from dino.layers import LossScaling, SquaredIoULoss
from dino.modeling.variants import DistinctSelection, PositionModulatedMatcher

from ....configs.common.data import dataloader
from ....configs.common.models.dino_r18 import model
from ....configs.common.optim import optimizer
from ....configs.common.train import train

model.network.query_selection._target_ = DistinctSelection
model.criterion.matcher._target_ = PositionModulatedMatcher
model.criterion.class_loss = L(SquaredIoULoss)()
model.criterion.class_weight = 6.0
model.criterion = L(LossScaling)(criterion=model.criterion, factors={"loss_ce_dn": 1 / 6})

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(prob=0.5, horizontal=True),
    L(T.RandomFlip)(prob=0.0, horizontal=False, vertical=True),
    L(T.RandomBrightness)(intensity_min=0.8, intensity_max=1.2),
    L(T.RandomContrast)(intensity_min=0.8, intensity_max=1.2),
    L(OneOf)(branches=[[], [L(T.RandomExtent)(scale_range=[0.67, 1.5], shift_range=[0.2, 0.2])]]),  # black outside
    L(ShortSide)(sizes=[288], max_size=576),
]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[288], max_size=576)]
dataloader.train.total_batch_size = 2
dataloader.train.sorted_batches = 8
dataloader.train.num_workers = dataloader.test.num_workers = 1

optimizer.lr = 4e-4
del optimizer.params.lr_factor_func  # nothing is pre-trained, so nothing needs to learn slowly

train.max_iter = 2500
train.eval_period = train.checkpointer.period = 500
train.ema.enabled = True
train.ema.decay = 0.999  # averages about 1000 steps
lr_multiplier = L(WarmupParamScheduler)(  # rises over a tenth; the last fifth at a tenth
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[4], num_updates=5),
    warmup_factor=0.02,
    warmup_length=0.1,
    warmup_method="linear",
)
