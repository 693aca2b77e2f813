"""A detector that trains a step in a few hundredths of a second, and inputs for it in Detectron2's form."""

import torch
from detectron2.structures import Boxes, Instances

from dino.d2 import DINODetector

from ..tiny import default_criterion, random_boxes, stirred, tiny_network


def tiny_detector(*, num_classes=3, max_detections=20, **changes):
    network = tiny_network(num_classes=num_classes, **changes)
    model = DINODetector(
        network=network, criterion=default_criterion(), num_classes=num_classes, max_detections=max_detections
    )
    return stirred(model)


def random_input(name, count=2, height=64, width=80, num_classes=3):
    """The dict of one image with `count` objects."""
    boxes = random_boxes(count) * torch.tensor([width, height, width, height])
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    instances = Instances((height, width), gt_boxes=Boxes(corners), gt_classes=torch.randint(num_classes, (count,)))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"file_name": name, "image": image, "height": height, "width": width, "instances": instances}
