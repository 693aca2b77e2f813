"""Detectron2's Faster R-CNN with ResNet-18 and FPN, on the data, the norm and the budget of the ablations.

The optimiser is its own: SGD with momentum, a rate of 0.02 for 16 images, linear warm-up, gradients not clipped.
Because the images are small, anchors are half as large as usual, and 128 proposals of an image are trained on, not 512.
"""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params

from .base import dataloader, lr_multiplier, train
from .base import model as dino

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[part]
del part
model.roi_heads.batch_size_per_image = 128
stages = model.backbone.bottom_up.stages
model.backbone.bottom_up.stem.norm = "BN"
model.backbone.bottom_up.stages = dict(_target_=stages._target_, depth=18, norm="BN")
model.backbone.bottom_up.freeze_at = 0
del stages
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
model.pixel_mean, model.pixel_std, model.input_format = dino.pixel_mean, dino.pixel_std, "RGB"
del dino

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=0.02 * dataloader.train.total_batch_size / 16,
    momentum=0.9,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(scheduler=lr_multiplier, warmup_length=0.1, warmup_factor=0.001)
train.clip_norm = float("inf")
