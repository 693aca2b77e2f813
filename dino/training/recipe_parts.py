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
from dino.utils.files import UserError
from dino.weights.description import PARTS

from .parameter_groups import parameter_groups
from .recipe_data import SplitFiles, TrainLoader, TrainMapper, ValTransform, files_of, open_images
from .recipe_nodes import full_name, instantiate, plain
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
    "CombiningMapper": TrainMapper,
    "DINODetector": dict,
    "TrainLoader": TrainLoader,
    "TrainMapper": TrainMapper,
    "TestMapper": dict,
    "WarmupParamScheduler": warm_up,
    "dataset": _dataset,
    "get_default_optimizer_params": parameter_groups,
}
_READ_ELSEWHERE = ("Evaluator", "build_detection_test_loader")  # their arguments are settings of the engine
_ONLY = {  # key of a node -> last parts of its target
    "model": ("DINODetector",),
    "dataloader.train": ("TrainLoader",),
    "dataloader.train.dataset": ("dataset",),
    "dataloader.train.mapper": ("TrainMapper", "CombiningMapper"),
    "dataloader.test": ("build_detection_test_loader",),
    "dataloader.test.dataset": ("dataset",),
    "dataloader.test.mapper": ("TestMapper",),
    "dataloader.evaluator": ("Evaluator",),
}
_WITHOUT = NEEDS_DETECTRON2.removeprefix("which ")


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
    for key, path in sorted(_targets(cfg), key=lambda target: not target[0].startswith("model")):
        _check_target(key, path if isinstance(path, str) else full_name(path))
    for key, node in _nodes(cfg.model.network, "model.network"):
        if _last(node.get("_target_")) == "ResNet":
            _check_resnet(key, node)
    for key, expected in (("train.parallel", "ddp"), ("train.wandb.enabled", False)):
        value = OmegaConf.select(cfg, key, default=expected)
        if value != expected:
            raise UserError(f"{key}={value} {_WITHOUT}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"a training in several processes {_WITHOUT}: start one process")


def _last(path: Any) -> str:
    """The last part of the dotted path of a target."""
    return str(path).rpartition(".")[2]


def _check_target(key: str, path: str) -> None:
    """Raise a UserError if a target is Detectron2's, and nothing takes its place."""
    last = _last(path)
    known = last in _COUNTERPARTS or last in _READ_ELSEWHERE
    if key in _ONLY and last not in _ONLY[key]:
        raise UserError(f"{key} is {path}, {NEEDS_DETECTRON2}; without it, {' or '.join(_ONLY[key])} works")
    if _of_detectron2(path) and not known:
        cure = "; the backbones of torchvision and timm do without" if "backbone" in key else ""
        cure = f"; augmentations that do without: {', '.join(BY_NAME)}" if "augmentations" in key else cure
        raise UserError(f"{key} is {path}, {NEEDS_DETECTRON2}{cure}")


def _check_resnet(key: str, node: DictConfig) -> None:
    """Raise a UserError for norms of Detectron2's ResNet that torchvision's does not train in the same way."""
    norms = {OmegaConf.select(node, part, default="BN") for part in ("stem.norm", "stages.norm")}
    if len(norms) > 1 or (norms != {"FrozenBN"} and node.get("freeze_at", 2)):
        raise UserError(
            f"{key} mixes frozen and trained norms, {NEEDS_DETECTRON2}: set stem.norm, stages.norm and freeze_at to "
            "FrozenBN, FrozenBN and 0 to 5, or to BN, BN and 0"
        )


def _targets(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """The dotted key and the target of every node in a recipe."""
    return ((key, node["_target_"]) for key, node in _nodes(cfg) if "_target_" in node)


def _nodes(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """The dotted key of each dict in a recipe, and the dict."""
    if not OmegaConf.is_config(node):
        return
    if OmegaConf.is_dict(node):
        yield key, node
    for name in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if not OmegaConf.is_interpolation(node, name):
            yield from _nodes(node[name], f"{key}.{name}" if key else str(name))


def preprocessing_of(cfg: DictConfig) -> Preprocessing:
    """What a recipe's model expects of its images."""
    resizes = [a for a in cfg.dataloader.test.mapper.augmentations if "sizes" in a]
    size = {"short_side": int(max(resizes[-1].sizes)), "max_size": resizes[-1].get("max_size")} if resizes else {}
    model = {key: cfg.model[key] for key in Preprocessing._fields if key in cfg.model}
    model = {key: tuple(float(x) for x in value) if "pixel" in key else value for key, value in model.items()}
    model["input_range"] = check_input_range(model.get("input_range"))
    return Preprocessing(**model, **size)


def describe(cfg: DictConfig) -> dict[str, Any]:
    """Make the `about` of a checkpoint: the recipe's model as JSON text, and the preprocessing of its images."""
    preprocessing = preprocessing_of(cfg)._asdict()
    lists = {key: list(value) for key, value in preprocessing.items() if key.startswith("pixel")}
    model = plain(OmegaConf.to_container(cfg.model, resolve=True))
    return {"config": json.dumps(model), "preprocessing": {**preprocessing, **lists}}


def _build(node: Any, key: str) -> Any:
    """Build the node at a key of a recipe.

    Raises:
        UserError: a part refuses its arguments, or needs a library that is not installed.
    """
    try:
        return instantiate(node, find_part)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{key} of the recipe can't be built: {error}") from error


def build_detector(cfg: DictConfig, names: Sequence[str], category_ids: Sequence[int] = ()) -> Detector:
    """Build the recipe's detector and its criterion, with random weights, on `train.device`.

    Args:
        names, category_ids: of the classes, by label.

    Raises:
        UserError: a part refuses its arguments, or needs a library that is not installed.
    """
    model = _build(cfg.model, "model")
    network, criterion = model["network"], model["criterion"]
    detector = Detector(network, preprocessing_of(cfg), names, category_ids=category_ids, criterion=criterion)
    detector = detector.to(cfg.train.device)
    if torch.device(cfg.train.device).type == "cpu":
        use_cpu_feed_forward(detector)
    return detector


def build_optimizer(cfg: DictConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Build the recipe's optimizer.

    Args:
        network: the `Detector`: names of parameters begin with "network.".

    Raises:
        UserError: as of `build_detector`.
    """
    return _build({**cfg.optimizer, "params": {**cfg.optimizer.params, "model": network}}, "optimizer")


def build_schedule(cfg: DictConfig) -> Callable[[float], float]:
    """Build the recipe's schedule: share of the training in [0, 1] -> factor of the learning rate.

    Raises:
        ValueError: its numbers contradict each other.
    """
    return instantiate(cfg.lr_multiplier, find_part)


def train_loader(cfg: DictConfig) -> TrainLoader:
    """Build the recipe's training loader. Errors as of `files_of` and `read_annotations`."""
    return _build(cfg.dataloader.train, "dataloader.train")


def train_mapper(cfg: DictConfig) -> TrainMapper:
    """Build the mapper of the recipe's training loader, which must know `train.max_iter` where it combines images."""
    return instantiate(cfg.dataloader.train.mapper, find_part)


def val_images(cfg: DictConfig) -> CocoImages:
    """Open the recipe's validation images, augmented as it says. Errors as of `files_of` and `read_annotations`."""
    mapper = cfg.dataloader.test.mapper
    transform = ValTransform(_build(mapper.augmentations, "dataloader.test.mapper.augmentations"))
    return open_images(files_of(cfg.dataloader.test.dataset)).with_transforms(transform, mapper.get("input_range"))
