"""The data of a training: what there is, and what looks wrong."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from dino.utils.files import DataError
from dino.utils.printable import printable

from .progress import Objects
from .start_summary import Split

logger = logging.getLogger("detectron2.dino")


class DataSummary(NamedTuple):
    """The data of a training.

    Args:
        train, val: numbers of images and objects.
        sizes: (N,) square roots of the areas of training objects after the evaluation's resize, in pixels.
        doubts: what looks wrong, see `Objects.doubts`.
    """

    train: Split
    val: Split
    sizes: np.ndarray
    doubts: list[str]


def refuse_no_objects(cfg: DictConfig, train: str | None, val: str | None) -> None:
    """Raise a DataError if there is nothing to learn; warn if there is no AP to expect.

    Args:
        cfg: the recipe.
        train, val: what `no_objects` says of the data.
    """
    if train:
        raise DataError(f"nothing to learn: {train}")
    if val and cfg.train.best.patience:
        raise DataError(f"train.best.patience={cfg.train.best.patience} needs an AP, but {val}")
    if val:
        logger.warning(f"AP will be undefined, and there will be no model_best.pth: {val}")


def summarise_images(
    cfg: DictConfig,
    images: Sequence[dict],
    val_images: Sequence[dict],
    names: Sequence[str],
    sizes: np.ndarray,
    scores: int = 0,
) -> DataSummary:
    """Log a summary of the data, and warn of classes without objects and of limits that are too low.

    Args:
        cfg: the recipe.
        images, val_images: dicts with `file_name`, `height`, `width` and `annotations`, a list of dicts with
            `category_id`, a label, and `bbox`, xyxy in pixels.
        names: of the classes.
        sizes: (N,) square roots of the areas of training objects after the evaluation's resize, in pixels.
        scores: number of training annotations with a score.
    """
    train, val = _split(names, images), _split(names, val_images)
    logger.info(
        f"{train.images} training images, {train.empty} of them without objects; {sum(train.objects.values())} objects "
        f"of {len(names)} classes"
    )
    unseen = [printable(name) for name, count in train.objects.items() if not count]
    if unseen:
        logger.warning(f"no training image shows {', '.join(unseen[:10])}")
    _warn_of_limits(cfg, images)
    if len(sizes):
        low, median, high = np.percentile(sizes, (5, 50, 95))
        logger.info(
            f"size of objects after the evaluation's resize, square root of the area in pixels: 5% below {low:.0f}, "
            f"median {median:.0f}, 5% above {high:.0f}"
        )
    doubts = Objects(sizes, _shares(images), Counter(train.objects), Counter(val.objects), scores).doubts()
    for doubt in doubts:
        logger.warning(doubt)
    return DataSummary(train, val, sizes, doubts)


def _split(names: Sequence[str], images: Sequence[dict]) -> Split:
    """Numbers of images and objects."""
    counts = Counter(o["category_id"] for x in images for o in x["annotations"])
    empty = sum(not x["annotations"] for x in images)
    return Split(len(images), empty, {name: counts[label] for label, name in enumerate(names)})


def _shares(images: Sequence[dict]) -> np.ndarray:
    """(N,) areas of all boxes, as shares of their image."""
    shares = []
    for x in images:
        boxes = np.array([o["bbox"] for o in x["annotations"]]).reshape(-1, 4)
        shares += list((boxes[:, 2:] - boxes[:, :2]).prod(1) / (x["height"] * x["width"]))
    return np.array(shares)


def _warn_of_limits(cfg: DictConfig, images: Sequence[dict]) -> None:
    """Warn of limits per image that are below the number of objects of the fullest image."""
    fullest = max(images, key=lambda x: len(x["annotations"]))
    limits = {
        "queries": OmegaConf.select(cfg, "model.network.query_selection.num_queries"),
        "denoising queries": OmegaConf.select(cfg, "model.network.denoising.num_denoising"),
        "detections of COCO's AP": OmegaConf.select(cfg, "dataloader.evaluator.max_dets_per_image") or 100,
    }
    count = len(fullest["annotations"])
    for what, limit in limits.items():
        if limit and count > limit:
            name = printable(fullest["file_name"], 200)
            logger.warning(f"{name} has {count} objects, more than the {limit} {what} per image")
