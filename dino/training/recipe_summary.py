"""The summary of a recipe's data, from its files."""

from __future__ import annotations

import numpy as np
from omegaconf import DictConfig

from dino.data.coco import CocoImages
from dino.modeling.detector import resized_size
from dino.utils.files import DataError

from .data_summary import DataSummary, refuse_no_objects, summarise_images
from .recipe_parts import preprocessing_of

_MOST_SIZED = 5000  # images whose objects are measured


def as_dicts(data: CocoImages) -> list[dict]:
    """The entries of a data set as `summarise_images` and `describe_run` want them."""
    return [
        {
            "file_name": str(data.folder / entry["file_name"]),
            "height": entry["height"],
            "width": entry["width"],
            "annotations": [{"category_id": label, "bbox": box} for label, box in data.objects[entry["id"]]],
        }
        for entry in data.images
    ]


def summarise_files(cfg: DictConfig, data: CocoImages, images: list[dict], val: CocoImages) -> DataSummary:
    """Log a summary of training and validation data.

    Args:
        cfg: the recipe.
        data, val: training and validation data.
        images: `as_dicts` of the training data.

    Raises:
        DataError: there are no images, or no objects; validation data without objects have no AP to stop early by.
    """
    if not images:
        raise DataError("the training data has no images")
    refuse_no_objects(cfg, data.problem, val.problem)
    preprocessing, sizes = preprocessing_of(cfg), []
    for x in images[:_MOST_SIZED]:
        size = resized_size(x["height"], x["width"], preprocessing.short_side, preprocessing.max_size)
        scale = (size[0] * size[1] / (x["height"] * x["width"])) ** 0.5
        sizes += [scale * ((x1 - x0) * (y1 - y0)) ** 0.5 for x0, y0, x1, y1 in (o["bbox"] for o in x["annotations"])]
    scores = sum("score" in a for a in data.data["annotations"])
    return summarise_images(cfg, images, as_dicts(val), data.names, np.array(sizes), scores)
