"""What all ablations share: full DINO, small enough for a few minutes on one processor core.

    python benchmarks/ablation.py

runs the table. Images of 160 pixels (short side), batch 2, ResNet-18 with trainable norms from random weights.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dino.d2.data_loading import ShortSide

from .....configs.common.data import dataloader
from .....configs.common.models.dino_r18 import model
from .....configs.common.optim import optimizer
from .....configs.common.train import train

model.network.neck.out_channels = 64
model.network.encoder.hidden_dim = 256

dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), L(ShortSide)(sizes=[160])]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[160])]
dataloader.train.num_workers = dataloader.test.num_workers = 0  # a run is one process

dataloader.train.total_batch_size = 2
optimizer.lr = 5e-4
del optimizer.params.lr_factor_func  # nothing is pre-trained, so nothing needs to learn slowly
train.epochs = train.eval_epochs = 25
train.max_iter = 800
train.eval_period = 160
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[4], num_updates=5)
