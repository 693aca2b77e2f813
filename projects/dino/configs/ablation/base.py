"""What all ablations share: the paper's DINO, small enough for one processor core.

    python benchmarks/ablation.py

runs the table. Network: EfficientNet-Lite0 with ImageNet weights, 3 + 3 layers of width 64, 100 queries; query
selection, denoising, matching and losses are the paper's. Optimiser, schedule, augmentation, frozen stages and
averaging of weights are those of `dino_efficientnet_lite0_small_data`, but images have 160 pixels (short side) and a
training 4,000 iterations of 2 images.
"""

from .....configs.common.models.dino_r18 import model
from ..dino_efficientnet_lite0_small_data import dataloader, lr_multiplier, optimizer, train
from ..dino_efficientnet_lite0_small_data import model as small_data

model.pixel_mean, model.pixel_std = small_data.pixel_mean, small_data.pixel_std
model.network.neck = small_data.network.neck
model.network.neck.out_channels = 64
model.network.encoder.hidden_dim = 256
del small_data

dataloader.train.mapper.augmentations[-1].sizes = dataloader.test.mapper.augmentations[-1].sizes = [160]
dataloader.train.num_workers = dataloader.test.num_workers = 0  # a run is one process
train.max_iter = 4000
train.eval_period = train.checkpointer.period = 1000
