"""Run a checkpoint over a data set, for `dino eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from omegaconf import DictConfig

from dino.data.coco import load_json
from dino.evaluation.report.evaluate import Detected, choose_weights
from dino.inference.cpu import keep_freed_memory
from dino.utils.files import UserError, make_folder, write_whole
from dino.utils.recipes import find_recipe
from dino.weights.class_rows import check_known
from dino.weights.inferred_description import open_checkpoint

from . import follow_file, recipe, recipe_description
from .data_loading import annotations_of
from .sources import local_file
from .training import engine
from .training.launch import launch
from .training.parallel import Processes
from .training.run_setup import run_setup


class _Job(NamedTuple):
    """What each process needs; Detectron2's set-up logs it and reads the first two."""

    config_file: str  # empty: the recipe that the checkpoint describes
    eval_only: bool
    weights: str  # empty: the recipe's
    overrides: Sequence[str]
    files: recipe.DataFiles
    output: str


def detect(
    folder: Path,
    *,
    weights: str | None = None,
    config_file: str = "",
    overrides: Sequence[str] = (),
    val_json: str | None = None,
    val_images: str | None = None,
    dataset: str | None = None,
    num_gpus: int = 1,
) -> Detected:
    """Run a checkpoint over a data set.

    Args:
        folder: a new folder for log, config and detections.
        weights: a file, an address or the name of published weights; without it, `train.init_checkpoint` of the recipe.
        config_file: recipe, by name or file; without it, the recipe that the checkpoint describes.
        overrides: of the recipe, each key=value.
        val_json, val_images: data in COCO format, instead of the recipe's.
        dataset: name of a data set registered in Detectron2, instead of the recipe's.
        num_gpus: processes to start.

    Raises:
        UserError: recipe or weights are missing or don't fit.
        DataError: the data are missing or broken.
    """
    keys = ("dataloader.test.dataset.name", "dataloader.evaluator.dataset_name") if dataset else ()
    job = _Job(
        config_file=str(find_recipe(config_file)) if config_file else "",
        eval_only=True,
        weights=weights or "",
        overrides=[*overrides, *(f"{key}={dataset}" for key in keys)],
        files=recipe.DataFiles(val_json=val_json and _add_annotations(val_json, folder), val_images=val_images),
        output=str(folder),
    )
    cfg = _load(job)
    _check_weights(cfg.train.init_checkpoint)
    make_folder(folder)
    launch(_work, Processes(num_gpus), job, cfg if num_gpus == 1 else None)
    name = cfg.dataloader.evaluator.dataset_name
    results, details = choose_weights(folder, {"Data": val_json or name, "Weights": cfg.train.init_checkpoint})
    return Detected(
        data=_annotations_of(name, folder),
        files={entry["image_id"]: Path(entry["file_name"]) for entry in DatasetCatalog.get(name)},
        results=results,
        details={**details, "Recipe": Path(job.config_file).stem} if config_file else details,
    )


def _check_weights(weights: str | None) -> None:
    """Fetch the weights before any process starts; raise an error if there are none."""
    if not weights:
        raise UserError("give a checkpoint: dino eval CHECKPOINT …")
    local_file(weights)


def _work(job: _Job, cfg: DictConfig | None) -> None:
    """One process. It reads the recipe if `cfg` is None: read twice, it would register its data twice."""
    keep_freed_memory()
    cfg = cfg or _load(job)
    messages = follow_file.follow(cfg, job.overrides) if job.config_file else []  # else the recipe is the file's
    with run_setup(cfg, job):
        follow_file.log(messages)
        engine.evaluate_checkpoint(cfg)


def _load(job: _Job) -> DictConfig:
    """The recipe with data, output folder and weights of the job."""
    if job.config_file:
        cfg = recipe.load_recipe(job.config_file, job.overrides, job.files, eval_only=True)
    elif job.weights:
        cfg = _load_described(job)
    else:
        raise UserError("give a checkpoint: dino eval CHECKPOINT …")
    cfg.train.output_dir = job.output
    if job.weights:
        cfg.train.init_checkpoint = job.weights
    return cfg


def _load_described(job: _Job) -> DictConfig:
    """The recipe that the checkpoint describes.

    Raises:
        DataError: the checkpoint describes none, or the data has classes that it lacks.
    """
    path, content = open_checkpoint(job.weights)
    cfg = recipe_description.describe_evaluation(path, content)
    cfg = recipe.complete(cfg, job.overrides, job.files, eval_only=True)
    check_known(content["names"], recipe.names_of(cfg.dataloader.test.dataset), job.weights)
    return cfg


def _add_annotations(path: str, folder: Path) -> str:
    """The path; for a file without the list of annotations, the path of a copy with an empty list."""
    data = load_json(path, "annotations")
    if not isinstance(data, dict) or "annotations" in data:
        return path
    make_folder(folder)
    copy = folder / "images.json"
    write_whole(copy, lambda part: part.write_text(json.dumps({**data, "annotations": []}), encoding="utf-8"))
    return str(copy)


def _annotations_of(name: str, folder: Path) -> dict[str, Any]:
    """A registered data set in COCO format, from its file or from its dicts."""
    if MetadataCatalog.get(name).get("json_file"):
        return annotations_of(name)
    path = str(folder / f"{name}.json")
    convert_to_coco_json(name, path, allow_cached=False)
    return load_json(path, "annotations")
