"""COCO with large-scale jitter (arXiv 2012.07177): resized to 0.1 to 2 times 1024 pixels, cropped to 1024 x 1024.

Smaller crops are not padded here: the batch pads and masks them.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dino.d2.data_loading import ShortSide

from .data import dataloader

SIZE = 1024  # pixels

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=SIZE, target_width=SIZE),
    L(T.FixedSizeCrop)(crop_size=(SIZE, SIZE), pad=False),
]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[SIZE], max_size=SIZE)]
