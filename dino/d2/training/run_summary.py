"""Summary of the data at the start of a training, from Detectron2's catalog."""

from __future__ import annotations

import numpy as np
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import print_instances_class_histogram
from omegaconf import DictConfig

from dino.d2.recipe import names_of
from dino.data.coco import no_objects
from dino.training.data_summary import DataSummary, refuse_no_objects, summarise_images
from dino.utils.files import DataError
from dino.utils.printable import printable


def summarise_data(cfg: DictConfig, images: list[dict], val_images: list[dict]) -> DataSummary:
    """Log a summary of the data, see `summarise_images`.

    Raises:
        DataError: there are no images, or no objects; validation data without objects have no AP to stop early by.
    """
    if not images:
        raise DataError("the training data has no images")
    train, test = cfg.dataloader.train.dataset, cfg.dataloader.test.dataset
    refuse_no_objects(cfg, _no_objects(train.name, images), _no_objects(test.name, val_images))
    names = names_of(train)
    print_instances_class_histogram(images, list(map(printable, names)))
    sizes = _sizes_after_resize(images[:5000], list(instantiate(cfg.dataloader.test.mapper).augmentations.augs))
    return summarise_images(cfg, images, val_images, names, sizes, MetadataCatalog.get(train.name).get("scores", 0))


def _no_objects(name: str, images: list[dict]) -> str | None:
    """`no_objects` of a registered data set and its cleaned dicts; without objects, reads its annotations again."""
    usable = sum(len(x["annotations"]) for x in images)
    raw = [] if usable else [a for x in DatasetCatalog.get(name) for a in x.get("annotations", [])]
    return no_objects(MetadataCatalog.get(name).get("json_file", name), len(images), raw, usable)


def _sizes_after_resize(images: list[dict], augmentations: list) -> np.ndarray:
    """(N,) square roots of the areas of all boxes, in pixels of the resized images; reads no image."""
    sizes = []
    for x in images:
        height, width = x["height"], x["width"]
        for augmentation in augmentations:
            blank = np.broadcast_to(np.uint8(0), (height, width, 3))
            transform = augmentation.get_transform(blank)
            height, width = getattr(transform, "new_h", height), getattr(transform, "new_w", width)
        scale = (height * width / (x["height"] * x["width"])) ** 0.5
        boxes = np.array([o["bbox"] for o in x["annotations"]]).reshape(-1, 4)  # xyxy, as `dataset` gives them
        sizes += list(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) * scale)
    return np.array(sizes)
