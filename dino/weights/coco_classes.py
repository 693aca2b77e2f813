from __future__ import annotations

import torchvision

from .checkpoint_formats import COCO_IDS, RAW_COCO_CLASSES


def coco_names(classes):
    raw = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {RAW_COCO_CLASSES: list(raw), len(COCO_IDS): [raw[i] for i in COCO_IDS]}.get(classes)


def coco_ids(classes):
    return list(COCO_IDS) if classes == len(COCO_IDS) else list(range(classes))
