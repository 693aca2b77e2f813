"""What all ablations share: full DINO, small enough for a few minutes on one processor core.

    python benchmarks/ablation.py

runs the table. Images of 160 pixels (short side), batch 2, ResNet-18 with trainable norms from random weights.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dino.d2.data_loading import ShortSide

from ..dino_r18_small_data import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.out_channels = 64
model.network.encoder.hidden_dim = 256

dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), L(ShortSide)(sizes=[160])]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[160])]
dataloader.train.num_workers = dataloader.test.num_workers = 0  # a run is one process

dataloader.train.total_batch_size = 2
optimizer.lr = 5e-4
train.max_iter = 800
train.eval_period = 160
