"""Detectron2's RetinaNet with ResNet-18 and FPN from random weights, on the ablations' data, optimiser and budget.

Anchors are half as large as usual.
"""

from detectron2 import model_zoo

from .faster_rcnn_r18_fpn import dataloader, lr_multiplier, optimizer, train
from .faster_rcnn_r18_fpn import model as faster_rcnn

model = model_zoo.get_config("common/models/retinanet.py").model
body = faster_rcnn.backbone.bottom_up
model.backbone.bottom_up = body
model.backbone.bottom_up.out_features = model.backbone.in_features
model.backbone.top_block.in_channels = 512
model.anchor_generator.sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (16, 32, 64, 128, 256)]
model.pixel_mean, model.pixel_std = faster_rcnn.pixel_mean, faster_rcnn.pixel_std
model.input_format = "RGB"
del body, faster_rcnn
