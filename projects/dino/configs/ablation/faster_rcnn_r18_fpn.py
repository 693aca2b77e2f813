"""Detectron2's Faster R-CNN with ResNet-18 and FPN from random weights, on the ablations' data, optimiser and budget.

Not comparable with `base`, which has another backbone with ImageNet weights: for that, see
benchmarks/compare_detectors.py. Because the images are small, anchors are half as large as usual, and 128 proposals of
an image are trained on, not 512.
"""

from detectron2 import model_zoo

from .base import dataloader, lr_multiplier, optimizer, train
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
train.init_checkpoint = ""
