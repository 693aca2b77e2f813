"""COCO with large-scale jitter (arXiv 2012.07177): resized to 0.1 to 2 times 1024 pixels, cropped to 1024 x 1024.

Crops that are smaller are not filled up: what a batch pads is masked.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dino.d2.data_loading import ShortSide

from .data import dataloader

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
    L(T.FixedSizeCrop)(crop_size=(1024, 1024), pad=False),
]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[1024], max_size=1024)]
