"""From the command line to a complete recipe: files, classes and epochs are resolved before anything is built."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import os
from pathlib import Path

import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig, OmegaConf

from dino.d2.training.parallel import from_main, restarted, started_by_same
from dino.utils.files import DataError, free_name
from dino.utils.recipes import find_recipe

from .data_loading import class_names, dataset

logger = logging.getLogger("detectron2.dino")

BATCH = "dataloader.train.total_batch_size"
HELP = {  # of Detectron2's arguments
    "config_file": "recipe, by name or file",
    "resume": "continue the run in train.output_dir",
    "eval_only": "evaluate train.init_checkpoint, train nothing",
    "num_gpus": "processes on this machine, one for each GPU",
    "num_machines": "how many machines take part",
    "machine_rank": "number of this machine, from 0 on",
    "dist_url": "where the machines meet, such as tcp://HOST:29500; one machine finds a port of its own",
    "opts": "overrides of the recipe, key=value",
}
# The one place of a recipe that states it, the parts interpolate; the second is that of Detectron2's R-CNNs.
NUM_CLASSES = ("model.num_classes", "model.roi_heads.num_classes")


def argument_parser(epilog: str) -> argparse.ArgumentParser:
    """Detectron2's arguments, told in this program's words, and four for data in COCO format."""
    parser = default_argument_parser(epilog)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    add_data_arguments(parser)
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The four arguments for data in COCO format."""
    for split in ("train", "val"):
        group = parser.add_argument_group(f"{split} data in COCO format, instead of the recipe's")
        group.add_argument(f"--{split}-json", help="annotations")
        group.add_argument(f"--{split}-images", help="folder of their images")


def load_recipe(args: argparse.Namespace) -> DictConfig:
    """Read the recipe, and complete it.

    Raises:
        DataError: a file is missing, a key is unknown, or what was asked for makes no sense; says what to do.
    """
    args.config_file = str(find_recipe(args.config_file))
    cfg = LazyConfig.load(args.config_file)
    check_recipe(cfg, args.config_file)
    return complete(cfg, args)


def complete(cfg: DictConfig, args: argparse.Namespace) -> DictConfig:
    """Apply the data and the overrides of the command line to a recipe, and fill in what follows from the data.

    Raises:
        DataError: see `load_recipe`.
    """
    use_files(cfg, args)
    if cfg.train.get("reference_batch") is None:
        cfg.train.reference_batch = OmegaConf.select(cfg, BATCH)
    check_overrides(cfg, args.opts)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    if not torch.cuda.is_available() and str(cfg.train.device).startswith("cuda"):
        cfg.train.device = "cpu"
    use_classes(cfg, any(o.split("=")[0] in NUM_CLASSES for o in args.opts), args.eval_only)
    if not args.eval_only:
        check_schedule(cfg)
    return cfg


def check_recipe(cfg: DictConfig, path: str) -> None:
    """Raise a DataError where a recipe lacks one of its five parts."""
    missing = [key for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train") if key not in cfg]
    if missing:
        raise DataError(f"{path} is no recipe: it does not define {', '.join(missing)}")


def check_schedule(cfg: DictConfig) -> None:
    """Raise a DataError where the schedule does not fit the epochs, as after an override of the epochs alone."""
    try:
        instantiate(cfg.lr_multiplier)
    except ValueError as error:
        raise DataError(
            f"lr_multiplier does not fit train.epochs={cfg.train.epochs}: {error}. Override "
            "lr_multiplier.milestones too"
        ) from error


def check_overrides(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise a DataError for an override whose key the recipe does not have, with the nearest key that it has."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise DataError(f"can't understand {override!r}: overrides are key=value, and options come before them")
        if not has_key(cfg, key):
            near = difflib.get_close_matches(key, all_keys(cfg), n=1, cutoff=0)
            raise DataError(f"the recipe has no key {key!r}; the nearest is {near[0]!r}")


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether `key`, dotted, with numbers for places in lists, leads anywhere; a value of None counts."""
    *path, last = key.split(".")
    node = OmegaConf.select(cfg, ".".join(path)) if path else cfg
    if OmegaConf.is_list(node):
        return last.isdigit() and int(last) < len(node)
    return OmegaConf.is_dict(node) and (last in node or last == "_target_")


def all_keys(node, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    if not OmegaConf.is_config(node):
        return []
    keys = range(len(node)) if OmegaConf.is_list(node) else [k for k in node if k != "_target_"]
    found = []
    for key in keys:
        name = f"{prefix}{key}"
        child = None if OmegaConf.is_interpolation(node, key) else node[key]
        found += [name, *all_keys(child, f"{name}.")]
    return found


def use_files(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Point the recipe at the COCO-format files of the command line."""
    for split, loader in (("train", "train"), ("val", "test")):
        annotations, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if bool(annotations) != bool(images):
            raise DataError(f"--{split}-json and --{split}-images belong together: give both")
        if annotations:
            paths = {"annotations": os.path.abspath(annotations), "images": os.path.abspath(images)}
            cfg.dataloader[loader].dataset = LazyCall(dataset)(name=f"custom_{split}", **paths)
            if split == "val":
                cfg.dataloader.evaluator.dataset_name = f"custom_{split}"
    if args.train_json and not args.val_json and not args.eval_only:
        raise DataError("--train-json without --val-json: give validation data of the same classes too")


def use_classes(cfg: DictConfig, stated: bool, eval_only: bool) -> None:
    """Take the number of classes from the data; a number `stated` on the command line must agree."""
    val = names_of(cfg.dataloader.test.dataset)
    train = val if eval_only else names_of(cfg.dataloader.train.dataset)
    if train != val:
        only_train, only_val = ([n for n in a if n not in b] for a, b in ((train, val), (val, train)))
        raise DataError(
            f"training and validation data differ in their classes: only in training {only_train}, only in validation "
            f"{only_val}" + ("" if only_train or only_val else ": the same names in another order")
        )
    key = next((key for key in NUM_CLASSES if has_key(cfg, key)), NUM_CLASSES[0])
    current = OmegaConf.select(cfg, key)
    if stated and current != len(train):
        raise DataError(f"{key}={current}, but the data has {len(train)} classes: write {key}={len(train)}")
    OmegaConf.update(cfg, key, len(train))


def names_of(node: DictConfig) -> list[str]:
    """Class names of the data set that a recipe's `L(dataset)(…)` describes."""
    if "name" not in node:
        raise DataError("the recipe's data sets must be written as L(dino.d2.data_loading.dataset)(name=…)")
    return class_names(node.name, node.get("annotations"), node.get("images"))


def use_epochs(cfg: DictConfig, num_images: int) -> None:
    """Turn epochs into iterations, wherever the recipe leaves a number of iterations open (None)."""
    train = cfg.train
    per_epoch = max(1, math.ceil(num_images / cfg.dataloader.train.total_batch_size))
    if train.max_iter is None:
        train.max_iter = max(1, round(train.epochs * per_epoch))
    if train.eval_period is None:
        train.eval_period = round(train.eval_epochs * per_epoch)
    if train.checkpointer.period is None:
        train.checkpointer.period = max(1, round(train.eval_epochs * per_epoch))
    logger.info(f"1 epoch = {per_epoch} iterations, {train.max_iter} iterations in all")


def choose_output(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Keep runs apart: an evaluation gets a folder of its own below `train.output_dir`, a new training a fresh one.

    A training that torchrun or Slurm starts again continues (`args.resume`), if it was they who started it.

    Raises:
        DataError: the folder holds a run that is not to be resumed, or there is nothing to evaluate.
    """
    folder = Path(cfg.train.output_dir)
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise DataError("--eval-only needs weights: write train.init_checkpoint=PATH")
        cfg.train.output_dir = from_main(str(free_name(folder / "evaluation")))
        return
    again = restarted() and started_by_same(folder)
    args.resume, used = from_main((args.resume or again, any(folder.glob("*.pth"))))
    if used and not args.resume:
        raise DataError(f"{folder} holds the checkpoints of a run: add --resume, or choose another train.output_dir")


def scale_to_batch(cfg: DictConfig, overrides: list[str]) -> None:
    """Adapt a recipe to a total batch other than `train.reference_batch`.

    The learning rate is proportional to it, numbers of iterations are inversely so. Numbers stated on the command line
    are taken as they stand.
    """
    batch, reference = OmegaConf.select(cfg, BATCH), cfg.train.reference_batch
    if not batch or batch == reference:
        return
    stated = {override.split("=")[0] for override in overrides}
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
