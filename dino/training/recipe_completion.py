"""Complete a recipe before anything is built: data files, overrides, classes, epochs. Both roads call it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from dino.data.images import check_input_range
from dino.utils.files import DataError, UsageError, UserError
from dino.utils.overrides import apply, has_key, keys_of

from .recipe_data import class_names
from .recipe_lengths import LENGTHS, count_iterations, leave_open
from .recipe_nodes import LazyCall
from .recipe_parts import build_schedule, check_supported

logger = logging.getLogger("detectron2.dino")

_DATASET = "dino.d2.data_loading.dataset"
_BATCH = "dataloader.train.total_batch_size"
# The key of a recipe that states the number of classes, and that of Detectron2's R-CNNs. Other parts interpolate it.
_NUM_CLASSES = ("model.num_classes", "model.roi_heads.num_classes")


class DataFiles(NamedTuple):
    """COCO-format annotations and image folders that replace a recipe's data; None leaves a split as it is."""

    train_json: str | None = None
    train_images: str | None = None
    val_json: str | None = None
    val_images: str | None = None


NO_FILES = DataFiles()


class Road(NamedTuple):
    """What completing a recipe takes from Detectron2's road, or from the one without it."""

    names_of: Callable[[Mapping], list[str]] = class_names  # the node of a data set -> its class names
    schedule_of: Callable[[DictConfig], object] = build_schedule  # recipe -> its schedule
    check: Callable[[DictConfig], object] = check_supported  # raises a UserError for what the road can't train


PLAIN = Road()


def complete(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    files: DataFiles = NO_FILES,
    *,
    eval_only: bool = False,
    road: Road = PLAIN,
) -> DictConfig:
    """Apply data files and overrides to a recipe, and fill in what follows from the data.

    Args:
        overrides: each key=value.
        eval_only: training data and schedule don't matter.
        road: on which the recipe will be trained.

    Raises:
        UserError: a key is unknown, a flag lacks its pair, the schedule does not fit the epochs, or the road can't
            train what the recipe asks for.
        DataError: a file is broken, or the classes don't fit.
    """
    leave_open(cfg)
    _use_files(cfg, files, eval_only)
    if cfg.train.get("reference_batch") is None:
        cfg.train.reference_batch = OmegaConf.select(cfg, _BATCH)
    cfg = apply(cfg, overrides)
    _check_counts(cfg)
    road.check(cfg)
    _prefer_epochs(cfg, keys_of(overrides))
    if not torch.cuda.is_available() and str(cfg.train.device).startswith("cuda"):
        cfg.train.device = "cpu"
    _use_classes(cfg, keys_of(overrides), _common_names(cfg, eval_only, road.names_of))
    _use_input_range(cfg)
    if not eval_only:
        _check_schedule(cfg, road.schedule_of)
    return cfg


def _check_counts(cfg: DictConfig) -> None:
    """Raise a UsageError if a length or the batch is not positive; None is left open."""
    for key in ("train.max_iter", "train.epochs", "train.grad_accum_steps", "train.log_period", _BATCH):
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and value <= 0:
            raise UsageError(f"{key} must be positive, not {value}")


def _prefer_epochs(cfg: DictConfig, stated: set[str]) -> None:
    """Let epochs that an override states replace iterations that the recipe states."""
    for iterations, epochs in LENGTHS.items():
        if epochs in stated and iterations not in stated:
            OmegaConf.update(cfg, iterations, None)


def _check_schedule(cfg: DictConfig, schedule_of: Callable[[DictConfig], object]) -> None:
    """Raise a UserError if the schedule does not fit the epochs, as after an override of the epochs alone."""
    try:
        schedule_of(cfg)
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"lr_multiplier of the recipe can't be built: {error}") from error
    except ValueError as error:
        raise UserError(
            f"lr_multiplier does not fit train.epochs={cfg.train.epochs}: {error}. Override "
            "lr_multiplier.milestones too"
        ) from error


def _use_files(cfg: DictConfig, files: DataFiles, eval_only: bool) -> None:
    """Point the recipe at COCO-format files."""
    pairs = {"train": (files.train_json, files.train_images), "val": (files.val_json, files.val_images)}
    for split, pair in pairs.items():
        if any(pair) and not all(pair):
            raise UserError(f"--{split}-json and --{split}-images belong together: give both")
    if files.train_json and not files.val_json and not eval_only:
        raise UserError("--train-json without --val-json: give validation data of the same classes too")
    if files.train_json:
        filter_empty = OmegaConf.select(cfg, "dataloader.train.dataset.filter_empty", default=False)
        cfg.dataloader.train.dataset = _dataset_node("train", *pairs["train"], filter_empty=filter_empty)
    if files.val_json:
        cfg.dataloader.test.dataset = node = _dataset_node("val", *pairs["val"])
        cfg.dataloader.evaluator.dataset_name = node.name


def _dataset_node(split: str, annotations: str, images: str, **options: bool) -> DictConfig:
    paths = {"annotations": os.path.abspath(annotations), "images": os.path.abspath(images)}
    return LazyCall(_DATASET)(name=f"custom_{split}", **paths, crowd="ignore", **options)


def _use_classes(cfg: DictConfig, stated: set[str], names: Sequence[str]) -> None:
    """Take the number of classes from the data's names. Where it is among the `stated` keys, it must agree."""
    classes = len(names)
    key = next((key for key in _NUM_CLASSES if has_key(cfg, key)), _NUM_CLASSES[0])
    current = OmegaConf.select(cfg, key)
    if not stated.isdisjoint(_NUM_CLASSES) and current != classes:
        raise UserError(f"{key}={current}, but the data has {classes} classes: write {key}={classes}")
    OmegaConf.update(cfg, key, classes)


def _use_input_range(cfg: DictConfig) -> None:
    """Let the mappers read images as the model expects them; a recipe without `model.input_range` stays as it is."""
    input_range = check_input_range(OmegaConf.select(cfg, "model.input_range"))
    for split in ("train", "test") if input_range else ():
        mapper = OmegaConf.select(cfg, f"dataloader.{split}.mapper")
        if mapper is not None:
            mapper.input_range = list(input_range)


def _common_names(cfg: DictConfig, eval_only: bool, names_of: Callable[[Mapping], list[str]]) -> list[str]:
    """Class names of the data; training and validation data must agree."""
    val = names_of(cfg.dataloader.test.dataset)
    train = val if eval_only else names_of(cfg.dataloader.train.dataset)
    if train != val:
        only_train, only_val = [n for n in train if n not in val], [n for n in val if n not in train]
        order = "" if only_train or only_val else ": the same names in another order"
        raise DataError(
            f"training and validation data differ in their classes: only in training {only_train}, only in validation "
            f"{only_val}{order}"
        )
    return val


def use_epochs(cfg: DictConfig, num_images: int) -> None:
    """Turn epochs into iterations wherever the recipe leaves a number of iterations open (None)."""
    train = cfg.train
    data = (num_images, cfg.dataloader.train.total_batch_size)
    if train.max_iter is None:
        train.max_iter = count_iterations(train.epochs, *data)
    if train.eval_period is None:
        train.eval_period = count_iterations(train.eval_epochs, *data, least=0)
    if train.checkpointer.period is None:
        train.checkpointer.period = count_iterations(train.eval_epochs, *data)
    logger.info(f"1 epoch = {count_iterations(1, *data)} iterations, {train.max_iter} iterations in all")


def scale_to_batch(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Adapt a recipe to a total batch other than `train.reference_batch`.

    The learning rate grows with the batch, numbers of iterations shrink. Numbers among the overrides stay as they are.
    """
    batch, reference = OmegaConf.select(cfg, _BATCH), cfg.train.reference_batch
    if not batch or batch == reference:
        return
    stated = keys_of(overrides)
    changes = []
    if "optimizer.lr" not in stated and "lr" in cfg.optimizer:
        changes.append(f"optimizer.lr {cfg.optimizer.lr:.2e} -> {cfg.optimizer.lr * batch / reference:.2e}")
        cfg.optimizer.lr *= batch / reference
    for key in ("train.max_iter", "train.eval_period", "train.checkpointer.period"):
        value = OmegaConf.select(cfg, key)
        if value and key not in stated:
            OmegaConf.update(cfg, key, max(1, round(value * reference / batch)))
            changes.append(f"{key} {value} -> {OmegaConf.select(cfg, key)}")
    cfg.train.reference_batch = batch
    logger.info(f"total batch {batch}, the recipe's is {reference}: {', '.join(changes) or 'nothing else changed'}")
