"""Summary at the start of a training: data, plan, and all that is needed to repeat the run."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import print_instances_class_histogram
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

import dino
from dino.d2.recipe import names_of
from dino.data.coco import no_objects
from dino.layers.ops.operator_report import operator_form, operator_lines
from dino.modeling import float32_precision
from dino.training.progress import Objects
from dino.training.start_summary import Plan, Split
from dino.utils.files import DataError
from dino.utils.printable import printable

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


def summarise_data(cfg: DictConfig, images: list[dict], val_images: list[dict]) -> DataSummary:
    """Log a summary of the training data, and warn of classes without objects and of limits that are too low.

    Raises:
        DataError: there are no images, or no objects; validation data without objects have no AP to stop early by.
    """
    if not images:
        raise DataError("the training data has no images")
    _refuse_no_objects(cfg, images, val_images)
    names = names_of(cfg.dataloader.train.dataset)
    objects = sum(len(x["annotations"]) for x in images)
    empty = sum(not x["annotations"] for x in images)
    logger.info(
        f"{len(images)} training images, {empty} of them without objects; {objects} objects of {len(names)} classes"
    )
    shown = list(map(printable, names))
    print_instances_class_histogram(images, shown)
    unseen = sorted(set(range(len(names))) - {o["category_id"] for x in images for o in x["annotations"]})
    if unseen:
        logger.warning(f"no training image shows {', '.join(shown[label] for label in unseen[:10])}")
    _warn_of_limits(cfg, images)
    sizes = _log_sizes(cfg, images)
    scores = MetadataCatalog.get(cfg.dataloader.train.dataset.name).get("scores", 0)
    doubts = Objects(sizes, _shares(images), _count(names, images), _count(names, val_images), scores).doubts()
    for doubt in doubts:
        logger.warning(doubt)
    return DataSummary(_split(names, images), _split(names, val_images), sizes, doubts)


def _refuse_no_objects(cfg: DictConfig, images: list[dict], val_images: list[dict]) -> None:
    """Raise a DataError if there is nothing to learn; warn if there is no AP to expect."""
    problem = _no_objects(cfg.dataloader.train.dataset.name, images)
    if problem:
        raise DataError(f"nothing to learn: {problem}")
    problem = _no_objects(cfg.dataloader.test.dataset.name, val_images)
    if problem and cfg.train.best.patience:
        raise DataError(f"train.best.patience={cfg.train.best.patience} needs an AP, but {problem}")
    if problem:
        logger.warning(f"AP will be undefined, and there will be no model_best.pth: {problem}")


def _no_objects(name: str, images: list[dict]) -> str | None:
    """`no_objects` of a registered data set and its cleaned dicts; without objects, reads its annotations again."""
    usable = sum(len(x["annotations"]) for x in images)
    raw = [] if usable else [a for x in DatasetCatalog.get(name) for a in x.get("annotations", [])]
    return no_objects(MetadataCatalog.get(name).get("json_file", name), len(images), raw, usable)


def _count(names: list[str], images: list[dict]) -> Counter[str]:
    """Number of objects of each class, by its name."""
    return Counter(names[o["category_id"]] for x in images for o in x["annotations"])


def _split(names: list[str], images: list[dict]) -> Split:
    """Numbers of images and objects."""
    counts = _count(names, images)
    return Split(len(images), sum(not x["annotations"] for x in images), {name: counts[name] for name in names})


def _shares(images: list[dict]) -> np.ndarray:
    """(N,) areas of all boxes, as shares of their image."""
    shares = []
    for x in images:
        boxes = np.array([o["bbox"] for o in x["annotations"]]).reshape(-1, 4)
        shares += list((boxes[:, 2:] - boxes[:, :2]).prod(1) / (x["height"] * x["width"]))
    return np.array(shares)


def _warn_of_limits(cfg: DictConfig, images: list[dict]) -> None:
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


def _log_sizes(cfg: DictConfig, images: list[dict]) -> np.ndarray:
    """Log the sizes of the objects after the resize, and return them, (N,) in pixels."""
    sizes = _sizes_after_resize(images[:5000], list(instantiate(cfg.dataloader.test.mapper).augmentations.augs))
    if len(sizes):
        low, median, high = np.percentile(sizes, (5, 50, 95))
        logger.info(
            f"size of objects after the evaluation's resize, square root of the area in pixels: 5% below {low:.0f}, "
            f"median {median:.0f}, 5% above {high:.0f}"
        )
    return sizes


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


def summarise_plan(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer, about: dict) -> None:
    """Log the training plan: batch, length, learning rates, precision, versions."""
    train, loader = cfg.train, cfg.dataloader.train
    world, parts = comm.get_world_size(), train.grad_accum_steps
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = loader.get("total_batch_size", 0)
    logger.info(
        "\n".join(
            [
                "training plan",
                f"  batch: {batch} images = {world} processes x {parts} parts x {batch // (world * parts)} images",
                f"  length: {train.max_iter} iterations; an evaluation every {train.eval_period}, a checkpoint every "
                f"{train.checkpointer.period}",
                f"  learning rates: {_learning_rates(optimizer)}",
                f"  parameters: {total / 1e6:.2f} M, {trained / 1e6:.2f} M trainable",
                f"  precision: {train.amp.dtype if train.amp.enabled else 'float32'}; float32 on a GPU: "
                f"{float32_precision()}",
                f"  compile: {_on(train.compile)}; activation checkpointing: "
                f"{', '.join(train.activation_checkpointing) or 'off'}; averaged weights: {_on(train.ema.enabled)}",
                *(f"  {line.strip()}" for line in operator_lines()),
                *(f"  {key}: {value}" for key, value in about.items()),
            ]
        )
    )


def start_plan(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer, images: int, start: int) -> Plan:
    """The training plan for the summary on the console.

    Args:
        images: number of training images.
        start: completed iterations.
    """
    train, world = cfg.train, comm.get_world_size()
    device = torch.device(train.device)
    batch = cfg.dataloader.train.get("total_batch_size", 0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Plan(
        batch=batch,
        iterations=train.max_iter,
        per_epoch=math.ceil(images / batch) if batch else 0,
        eval_period=train.eval_period,
        rates=_rates_by_part(model, optimizer),
        precision=train.amp.dtype if train.amp.enabled else "float32",
        device=f"{world} processes on {where}" if world > 1 else where,
        operator=operator_form(device),
        start=start,
    )


def _rates_by_part(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The highest learning rate of the backbone and that of all other parameters."""
    slow = {id(p) for name, p in model.named_parameters() if "backbone." in name}
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for part in {"backbone" if id(p) in slow else "the rest" for p in group["params"]}:
            rates[part] = max(group["lr"], rates.get(part, 0.0))
    return rates if len(set(rates.values())) > 1 else {"all": max(rates.values())}


def _learning_rates(optimizer: torch.optim.Optimizer) -> str:
    """Each learning rate with its number of parameters, most parameters first."""
    rates = Counter()
    for group in optimizer.param_groups:
        rates[group["lr"]] += sum(p.numel() for p in group["params"])
    return ", ".join(f"{rate:.2e} for {n / 1e6:.2f} M" for rate, n in rates.most_common())


def _on(enabled: bool) -> str:
    return "on" if enabled else "off"


def describe_run(images: list[dict], seed: int) -> dict[str, str | int]:
    """All that is needed to repeat the run, besides the recipe: versions, commit, seed, fingerprint of the data."""
    return {
        "dino": dino.__version__,
        "torch": str(torch.__version__),
        "commit": _commit(),
        "seed": seed,
        "data": _fingerprint(images),
    }


def _commit() -> str:
    """Commit of the package's checkout, with "-dirty" if files have changed since."""
    command = ["git", "-C", str(Path(dino.__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def _fingerprint(images: list[dict]) -> str:
    """Fingerprint of file names, sizes, boxes and labels in their order; not of pixels or folders."""
    digest = hashlib.sha256()
    for x in images:
        objects = [(o["category_id"], list(o["bbox"])) for o in x["annotations"]]
        digest.update(repr((os.path.basename(x["file_name"]), x["height"], x["width"], objects)).encode())
    return digest.hexdigest()[:16]
