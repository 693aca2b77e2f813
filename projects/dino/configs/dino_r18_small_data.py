"""DINO for a few hundred pictures and random weights: ResNet-18 with trainable BatchNorm, 3 + 3 layers of width 128.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r18_small_data.py \
        --train-json train.json --train-images images --val-json val.json --val-images images \
        train.output_dir=output/mine

No AP is published for it; README.md states what it reached on 205 microscope photographs. Flips go both ways: pictures
that have an up and a down want `dataloader.train.mapper.augmentations.1.prob=0`.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dino.d2.data_loading import ShortSide

from ....configs.common.data import dataloader
from ....configs.common.models.dino_r50 import model
from ....configs.common.optim import optimizer
from ....configs.common.train import train

backbone = model.network.neck.backbone
backbone.stem.norm = "BN"
backbone.stages = dict(_target_=backbone.stages._target_, depth=18, norm="BN")
backbone.freeze_at = 0
del backbone  # a recipe's names are its keys, and an override of this one would change nothing
model.network.neck.out_channels = 128
model.network.encoder.num_layers = 3
model.network.encoder.hidden_dim = 512
model.network.decoder.num_layers = 3
model.network.query_selection.num_queries = 100
model.max_detections = 100

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(prob=0.5, horizontal=True),
    L(T.RandomFlip)(prob=0.5, horizontal=False, vertical=True),
    L(T.RandomBrightness)(intensity_min=0.8, intensity_max=1.2),
    L(T.RandomContrast)(intensity_min=0.8, intensity_max=1.2),
    L(ShortSide)(sizes=[288], max_size=576),
]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[288], max_size=576)]
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = dataloader.test.num_workers = 1

optimizer.lr = 4e-4
del optimizer.params.lr_factor_func  # nothing is pre-trained, so nothing needs to learn slowly

train.epochs = 25
train.eval_epochs = 25
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1], milestones=[4], num_updates=5
)  # the last fifth at a tenth
