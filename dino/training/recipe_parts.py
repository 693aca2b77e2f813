"""A recipe's parts without Detectron2: detector, optimizer, schedule and data from its nodes."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dino.data.augmentations import BY_NAME
from dino.data.coco import CocoImages
from dino.data.images import check_input_range
from dino.layers.cpu_feed_forward import use_cpu_feed_forward
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError, UserError
from dino.weights.description import PARTS

from .parameter_groups import parameter_groups
from .recipe_data import SplitFiles, TrainLoader, TrainMapper, ValTransform, files_of
from .recipe_nodes import instantiate, plain
from .recipe_reading import NEEDS_DETECTRON2, STOOD_IN
from .schedules import warm_up


def _dataset(**node: Any) -> SplitFiles:
    return files_of(node)


# Last part of a dotted path of Detectron2 or `dino.d2` -> what takes its place.
_COUNTERPARTS: dict[str, Callable] = {
    **BY_NAME,
    "BasicStem": PARTS["detectron2.modeling.backbone.BasicStem"],
    "ResNet": PARTS["detectron2.modeling.ResNet"],
    "make_default_stages": PARTS["detectron2.modeling.ResNet.make_default_stages"],
    "DINODetector": dict,
    "TrainLoader": TrainLoader,
    "TrainMapper": TrainMapper,
    "TestMapper": dict,
    "WarmupParamScheduler": warm_up,
    "dataset": _dataset,
    "get_default_optimizer_params": parameter_groups,
}
_READ_ELSEWHERE = ("Evaluator", "build_detection_test_loader")  # their arguments are settings of the engine


def _of_detectron2(path: Any) -> bool:
    return isinstance(path, str) and path.startswith(tuple(f"{package}." for package in STOOD_IN))


def find_part(path: str) -> Callable:
    """The class or function that a recipe calls `path`, or what takes its place without Detectron2.

    Raises:
        UserError: there is none.
    """
    if not _of_detectron2(path):
        try:
            return pkgutil.resolve_name(path)
        except (AttributeError, ImportError, ValueError) as error:
            raise UserError(f"the recipe names {path}, which can't be imported: {error}") from error
    last = path.rpartition(".")[2]
    if last not in _COUNTERPARTS:
        raise UserError(f"the recipe names {path}, {NEEDS_DETECTRON2}")
    return _COUNTERPARTS[last]


def check_supported(cfg: DictConfig) -> None:
    """Raise a UserError that names the first setting which needs Detectron2."""
    for key, path in _targets(cfg):
        if _of_detectron2(path) and path.rpartition(".")[2] not in {*_COUNTERPARTS, *_READ_ELSEWHERE}:
            kind = "; the backbones of torchvision and timm do without" if "backbone" in key else ""
            raise UserError(f"{key} is {path}, {NEEDS_DETECTRON2}{kind}")
    if cfg.train.get("parallel", "ddp") != "ddp":
        raise UserError(f"train.parallel={cfg.train.parallel} needs Detectron2 (README.md says how to install it)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes need Detectron2 (README.md says how to install it): start one")
    if OmegaConf.select(cfg, "train.wandb.enabled"):
        raise UserError("train.wandb.enabled=True needs Detectron2 (README.md says how to install it)")


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the target of every node in a recipe."""
    if OmegaConf.is_list(node):
        children = ((str(i), node[i]) for i in range(len(node)))
    elif OmegaConf.is_dict(node):
        children = ((k, node[k]) for k in node if not OmegaConf.is_interpolation(node, k))
    else:
        return
    for name, child in children:
        if name == "_target_":
            yield key, child
        else:
            yield from _targets(child, f"{key}.{name}" if key else name)


def preprocessing_of(cfg: DictConfig) -> Preprocessing:
    """What a recipe's model expects of its images."""
    resizes = [a for a in cfg.dataloader.test.mapper.augmentations if "sizes" in a]
    size = {"short_side": int(max(resizes[-1].sizes)), "max_size": resizes[-1].get("max_size")} if resizes else {}
    model = {
        key: cfg.model[key] for key in ("pixel_mean", "pixel_std", "max_detections", "input_range") if key in cfg.model
    }
    model = {key: tuple(float(x) for x in value) if "pixel" in key else value for key, value in model.items()}
    model["input_range"] = check_input_range(model.get("input_range"))
    return Preprocessing(**model, **size)


def describe(cfg: DictConfig) -> dict[str, Any]:
    """Make the `about` of a checkpoint: the recipe's model as JSON text, and the preprocessing of its images."""
    preprocessing = preprocessing_of(cfg)._asdict()
    lists = {key: list(value) for key, value in preprocessing.items() if key.startswith("pixel")}
    model = plain(OmegaConf.to_container(cfg.model, resolve=True))
    return {"config": json.dumps(model), "preprocessing": {**preprocessing, **lists}}


def build_detector(cfg: DictConfig, names: Sequence[str], category_ids: Sequence[int] = ()) -> Detector:
    """Build the recipe's detector and its criterion, with random weights, on `train.device`.

    Args:
        names, category_ids: of the classes, by label.

    Raises:
        DataError: a part refuses its arguments, or needs a library that is not installed.
    """
    try:
        model = instantiate(cfg.model, find_part)
        network, criterion = model["network"], model["criterion"]
        detector = Detector(network, preprocessing_of(cfg), names, category_ids=category_ids, criterion=criterion).to(
            cfg.train.device
        )
    except (ValueError, TypeError, ImportError) as error:
        raise DataError(f"the recipe's model can't be built: {error}") from error
    if torch.device(cfg.train.device).type == "cpu":
        use_cpu_feed_forward(detector)
    return detector


def build_optimizer(cfg: DictConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Build the recipe's optimizer.

    Args:
        network: the `Detector`: names of parameters begin with "network.".
    """
    arguments = {**cfg.optimizer, "params": {**cfg.optimizer.params, "model": network}}
    return instantiate(arguments, find_part)


def build_schedule(cfg: DictConfig) -> Callable[[float], float]:
    """Build the recipe's schedule: share of the training in [0, 1] -> factor of the learning rate.

    Raises:
        ValueError: its numbers contradict each other.
    """
    return instantiate(cfg.lr_multiplier, find_part)


def train_loader(cfg: DictConfig) -> TrainLoader:
    """Build the recipe's training loader. Errors as of `files_of` and `read_annotations`."""
    return instantiate(cfg.dataloader.train, find_part)


def val_images(cfg: DictConfig) -> CocoImages:
    """Open the recipe's validation images, augmented as it says. Errors as of `files_of` and `read_annotations`."""
    files, mapper = files_of(cfg.dataloader.test.dataset), cfg.dataloader.test.mapper
    transform = ValTransform(instantiate(mapper.augmentations, find_part))
    return CocoImages(
        files.annotations, files.images, transform, crowd=files.crowd, input_range=mapper.get("input_range")
    )
