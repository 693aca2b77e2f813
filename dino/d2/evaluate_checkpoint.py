"""Detections of a checkpoint on a data set, for `dino eval`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.engine import default_setup
from omegaconf import DictConfig

from dino.d2.training.launch import launch
from dino.data.coco import load_json
from dino.inference.cpu import keep_freed_memory
from dino.utils.files import DataError, make_folder, write_whole

from . import recipe, recipe_description
from .training import engine


class Detected(NamedTuple):
    """Annotations (parsed, COCO format), the file of each image id, detections in COCO's results format, and names.

    Args:
        details: what was evaluated, for the head of a report.
    """

    data: dict[str, Any]
    files: dict[int, Path]
    results: Path
    details: dict[str, str]


def detect(args: argparse.Namespace, folder: Path) -> Detected:
    """Run a checkpoint over the data that the arguments name.

    Args:
        args: as of `recipe.argument_parser`, and two of which each may be None: `weights`, a path, and `dataset`, the
            name of a registered set. Without `config_file`, the model is the one that the checkpoint describes.
        folder: a new folder for log, config and detections.

    Raises:
        DataError: recipe, weights or data are missing or don't fit.
    """
    args.eval_only, args.resume, args.output = True, False, str(folder)
    source = args.val_json
    if source:
        args.val_json = add_annotations(Path(source), folder)
    if args.dataset:
        keys = ("dataloader.test.dataset.name", "dataloader.evaluator.dataset_name")
        args.opts += [f"{key}={args.dataset}" for key in keys]
    cfg = load(args)
    weights = cfg.train.init_checkpoint
    if not weights:
        raise DataError("give the weights: --weights PATH")
    if "://" not in weights and not Path(weights).is_file():
        raise DataError(f"weights not found: {weights}")
    make_folder(folder)
    launch(work, args)
    name = cfg.dataloader.evaluator.dataset_name
    return Detected(
        data=annotations_of(name, folder),
        files={entry["image_id"]: Path(entry["file_name"]) for entry in DatasetCatalog.get(name)},
        results=folder / "inference/coco_instances_results.json",
        details={"Data": source or name, "Weights": weights, **recipe_name(args)},
    )


def recipe_name(args: argparse.Namespace) -> dict[str, str]:
    """For the head of a report; nothing where the checkpoint itself said what its model is."""
    return {"Recipe": Path(args.config_file).stem} if args.config_file else {}


def add_annotations(path: Path, folder: Path) -> str:
    """The path; for a file without the list of annotations, that of a copy with an empty one."""
    data = load_json(path, "annotations")
    if not isinstance(data, dict) or "annotations" in data:
        return str(path)
    make_folder(folder)
    copy = folder / "images.json"
    write_whole(copy, lambda part: part.write_text(json.dumps({**data, "annotations": []}), encoding="utf-8"))
    return str(copy)


def load(args: argparse.Namespace) -> DictConfig:
    """The recipe, or the one that the weights describe, set to the data and the folder of the arguments."""
    if args.config_file:
        cfg = recipe.load_recipe(args)
    elif args.weights:
        cfg = load_described(args)
    else:
        raise DataError("give the weights: --weights PATH")
    cfg.train.output_dir = args.output
    if args.weights:
        cfg.train.init_checkpoint = args.weights
    return cfg


def load_described(args: argparse.Namespace) -> DictConfig:
    """The recipe of a checkpoint that describes its model.

    Raises:
        DataError: it does not, or the data has another number of classes.
    """
    cfg = recipe_description.recipe_of(args.weights)
    classes = cfg.model.num_classes
    cfg = recipe.complete(cfg, args)
    if cfg.model.num_classes != classes:
        raise DataError(f"{args.weights} has {classes} classes, the data has {cfg.model.num_classes}")
    return cfg


def work(args: argparse.Namespace) -> None:
    """One process of an evaluation."""
    keep_freed_memory()
    cfg = load(args)
    default_setup(cfg, args)
    engine.evaluate_checkpoint(cfg)


def annotations_of(name: str, folder: Path) -> dict[str, Any]:
    """A registered set's annotations in COCO format, from its file or from its dicts."""
    path = MetadataCatalog.get(name).get("json_file")
    if not path:
        path = str(folder / f"{name}.json")
        convert_to_coco_json(name, path, allow_cached=False)
    data = load_json(path, "annotations")
    return {"annotations": [], **data}
