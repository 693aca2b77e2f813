"""Complete a recipe before anything is built: data files, overrides, classes, epochs and output folder."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf

from dino.d2.training.parallel import from_main, restarted, started_by_same
from dino.data.images import check_input_range
from dino.modeling.variants import Branches, CombinedCriterion
from dino.utils.files import DataError, UserError, free_name
from dino.utils.overrides import apply
from dino.utils.recipes import find_recipe

from .data_loading import class_names, dataset

logger = logging.getLogger("detectron2.dino")

_BATCH = "dataloader.train.total_batch_size"
_EPOCHS = {  # numbers of iterations, and the epochs from which they follow where they are None
    "train.max_iter": "train.epochs",
    "train.eval_period": "train.eval_epochs",
    "train.checkpointer.period": "train.eval_epochs",
}
# The key of a recipe that states the number of classes, and that of Detectron2's R-CNNs. Other parts interpolate it.
_NUM_CLASSES = ("model.num_classes", "model.roi_heads.num_classes")


class DataFiles(NamedTuple):
    """COCO-format annotations and image folders that replace a recipe's data; None leaves a split as it is."""

    train_json: str | None = None
    train_images: str | None = None
    val_json: str | None = None
    val_images: str | None = None


NO_FILES = DataFiles()

_SHARED_BY_LOSSES = ("matcher", "class_loss", "class_weight", "l1_weight", "giou_weight", "alpha", "gamma")


def load_recipe(
    config_file: str, overrides: Sequence[str] = (), files: DataFiles = NO_FILES, *, eval_only: bool = False
) -> DictConfig:
    """Read a recipe and complete it, see `complete`.

    Args:
        config_file: name or file of the recipe.

    Raises:
        UserError: the recipe is missing or incomplete; see `complete`.
    """
    path = str(find_recipe(config_file))
    cfg = LazyConfig.load(path)
    check_recipe(cfg, path)
    return complete(cfg, overrides, files, eval_only=eval_only)


def complete(
    cfg: DictConfig, overrides: Sequence[str] = (), files: DataFiles = NO_FILES, *, eval_only: bool = False
) -> DictConfig:
    """Apply data files and overrides to a recipe, and fill in what follows from the data.

    Args:
        overrides: each key=value.
        eval_only: training data and schedule don't matter.

    Raises:
        UserError: a key is unknown, a flag lacks its pair, or the schedule does not fit the epochs.
        DataError: a file is broken, or the classes don't fit.
    """
    _use_files(cfg, files, eval_only)
    if cfg.train.get("reference_batch") is None:
        cfg.train.reference_batch = OmegaConf.select(cfg, _BATCH)
    cfg = apply(cfg, overrides)
    _prefer_epochs(cfg, _keys(overrides))
    if not torch.cuda.is_available() and str(cfg.train.device).startswith("cuda"):
        cfg.train.device = "cpu"
    _use_classes(cfg, _keys(overrides), eval_only)
    _use_input_range(cfg)
    if not eval_only:
        _check_schedule(cfg)
    return cfg


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _prefer_epochs(cfg: DictConfig, stated: set[str]) -> None:
    """Let epochs that an override states replace iterations that the recipe states."""
    for iterations, epochs in _EPOCHS.items():
        if epochs in stated and iterations not in stated:
            OmegaConf.update(cfg, iterations, None)


def check_recipe(cfg: DictConfig, path: str) -> None:
    """Raise a UserError if a recipe lacks one of its five parts."""
    missing = [key for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train") if key not in cfg]
    if missing:
        raise UserError(f"{path} is no recipe: it does not define {', '.join(missing)}")


def _check_schedule(cfg: DictConfig) -> None:
    """Raise a UserError if the schedule does not fit the epochs, as after an override of the epochs alone."""
    try:
        instantiate(cfg.lr_multiplier)
    except ValueError as error:
        raise UserError(
            f"lr_multiplier does not fit train.epochs={cfg.train.epochs}: {error}. Override "
            "lr_multiplier.milestones too"
        ) from error


def check_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise a UserError for an override whose key the recipe lacks. The message names the nearest key."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is no override: write key=value, and flags before overrides")
        if not _has_key(cfg, key):
            near = difflib.get_close_matches(key, _all_keys(cfg), n=1, cutoff=0)
            raise UserError(f"the recipe has no key {key!r}; the nearest is {near[0]!r}")


def _has_key(cfg: DictConfig, key: str) -> bool:
    """Whether the recipe has the dotted `key`; lists are indexed by numbers. A value of None counts."""
    *path, last = key.split(".")
    node = OmegaConf.select(cfg, ".".join(path)) if path else cfg
    if OmegaConf.is_list(node):
        return last.isdigit() and int(last) < len(node)
    return OmegaConf.is_dict(node) and (last in node or last == "_target_")


def _all_keys(node, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    if not OmegaConf.is_config(node):
        return []
    keys = range(len(node)) if OmegaConf.is_list(node) else [k for k in node if k != "_target_"]
    found = []
    for key in keys:
        name = f"{prefix}{key}"
        child = None if OmegaConf.is_interpolation(node, key) else node[key]
        found += [name, *_all_keys(child, f"{name}.")]
    return found


def _use_files(cfg: DictConfig, files: DataFiles, eval_only: bool) -> None:
    """Point the recipe at COCO-format files."""
    pairs = {"train": (files.train_json, files.train_images), "val": (files.val_json, files.val_images)}
    for split, pair in pairs.items():
        if any(pair) and not all(pair):
            raise UserError(f"--{split}-json and --{split}-images belong together: give both")
    if files.train_json and not files.val_json and not eval_only:
        raise UserError("--train-json without --val-json: give validation data of the same classes too")
    if files.train_json:
        cfg.dataloader.train.dataset = _dataset_node("train", *pairs["train"])
    if files.val_json:
        cfg.dataloader.test.dataset = node = _dataset_node("val", *pairs["val"])
        cfg.dataloader.evaluator.dataset_name = node.name


def _dataset_node(split: str, annotations: str, images: str) -> DictConfig:
    paths = {"annotations": os.path.abspath(annotations), "images": os.path.abspath(images)}
    return LazyCall(dataset)(name=f"custom_{split}", **paths, crowd="ignore")


def _use_classes(cfg: DictConfig, stated: set[str], eval_only: bool) -> None:
    """Take the number of classes from the data. Where the number is among the `stated` keys, it must agree."""
    classes = len(_common_names(cfg, eval_only))
    key = next((key for key in _NUM_CLASSES if _has_key(cfg, key)), _NUM_CLASSES[0])
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


def _common_names(cfg: DictConfig, eval_only: bool) -> list[str]:
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


def names_of(node: DictConfig) -> list[str]:
    """Class names of the data set in a recipe's `L(dataset)(…)`."""
    if "name" not in node:
        raise UserError("the recipe's data sets must be written as L(dino.d2.data_loading.dataset)(name=…)")
    return class_names(node.name, node.get("annotations"), node.get("images"))


def use_epochs(cfg: DictConfig, num_images: int) -> None:
    """Turn epochs into iterations wherever the recipe leaves a number of iterations open (None)."""
    train = cfg.train
    per_epoch = max(1, math.ceil(num_images / cfg.dataloader.train.total_batch_size))
    if train.max_iter is None:
        train.max_iter = max(1, round(train.epochs * per_epoch))
    if train.eval_period is None:
        train.eval_period = round(train.eval_epochs * per_epoch)
    if train.checkpointer.period is None:
        train.checkpointer.period = max(1, round(train.eval_epochs * per_epoch))
    logger.info(f"1 epoch = {per_epoch} iterations, {train.max_iter} iterations in all")


def choose_output(cfg: DictConfig, *, eval_only: bool = False, resume: bool = False) -> bool:
    """Keep runs apart: an evaluation gets a folder of its own below `train.output_dir`, a new training a fresh one.

    Returns:
        whether the training resumes: on request, or because torchrun or Slurm restarts the run that it started.

    Raises:
        UserError: the folder holds another run, or there is nothing to evaluate.
    """
    folder = Path(cfg.train.output_dir)
    if eval_only:
        if not cfg.train.init_checkpoint:
            raise UserError("--eval-only needs weights: write train.init_checkpoint=PATH")
        cfg.train.output_dir = from_main(str(free_name(folder / "evaluation")))
        return False
    again = restarted() and started_by_same(folder)
    resume, used = from_main((resume or again, any(folder.glob("*.pth"))))
    if used and not resume:
        raise UserError(f"{folder} holds the checkpoints of a run: add --resume, or choose another train.output_dir")
    return resume


def scale_to_batch(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Adapt a recipe to a total batch other than `train.reference_batch`.

    The learning rate grows with the batch, numbers of iterations shrink. Numbers among the overrides stay as they are.
    """
    batch, reference = OmegaConf.select(cfg, _BATCH), cfg.train.reference_batch
    if not batch or batch == reference:
        return
    stated = _keys(overrides)
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


def add_branch(model: DictConfig, name: str, branch: DictConfig, losses: DictConfig) -> None:
    """Add a branch to the network of a recipe's `model`, in place, and its losses to the criterion.

    Args:
        model: of the recipe; its criterion is a `SetCriterion` or a variant of it, or has branches already.
        name: of the branch; its losses are called after it.
        branch: see `dino.modeling.variants.branches`.
        losses: a criterion. Matcher, class loss and weights are those of the main criterion, unless it has its own.
    """
    if "branches" not in model.network:
        model.network["branches"] = LazyCall(Branches)()
        model["criterion"] = LazyCall(CombinedCriterion)(criterion=model.criterion, branches=LazyCall(Branches)())
    for key in _SHARED_BY_LOSSES:
        if key in model.criterion.criterion and key not in losses:
            losses[key] = f"${{...criterion.{key}}}"
    model.network.branches[name] = branch
    model.criterion.branches[name] = losses
