"""The description of a recipe's model that a checkpoint stores, and a recipe made from such a description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import LazyCall, LazyConfig
from detectron2.utils.registry import _convert_target_to_string as name_of
from omegaconf import DictConfig, OmegaConf

from dino.data.images import check_input_range
from dino.modeling.detector import Preprocessing
from dino.utils.recipes import find_recipe
from dino.weights.description import check_network_size, read_description, set_classes
from dino.weights.inferred_description import open_checkpoint

from .data_loading import ShortSide
from .meta_arch import DINODetector


def describe(cfg: DictConfig) -> dict[str, Any]:
    """Make the `about` of a checkpoint: the recipe's model as JSON text, and the preprocessing of its images."""
    resizes = [a for a in cfg.dataloader.test.mapper.augmentations if "sizes" in a]
    size = {"short_side": int(max(resizes[-1].sizes)), "max_size": resizes[-1].get("max_size")} if resizes else {}
    model = {
        key: cfg.model[key] for key in ("pixel_mean", "pixel_std", "max_detections", "input_range") if key in cfg.model
    }
    model = {key: [float(x) for x in value] if "pixel" in key else value for key, value in model.items()}
    model["input_range"] = check_input_range(model.get("input_range"))
    return {
        "config": json.dumps(_plain(OmegaConf.to_container(cfg.model, resolve=True))),
        "preprocessing": Preprocessing(**model, **size)._asdict(),
    }


def recipe_of(source: str | Path) -> DictConfig:
    """Make a recipe to evaluate a checkpoint: COCO's, with the model and the preprocessing of the file.

    Args:
        source: a file, an address or the name of published weights.

    Raises:
        DataError: the file is missing, broken or unsafe, or its model can't be described, or is larger
            than its weights.
        UserError: it can't be fetched.
    """
    return describe_evaluation(*open_checkpoint(source))


def describe_evaluation(path: str, content: Mapping) -> DictConfig:
    """`recipe_of` for the content of the file `path`, see `open_checkpoint`."""
    config, names, preprocessing = read_description(content, path)
    check_network_size(config, content, path)
    cfg = LazyConfig.load(str(find_recipe("dino_r50_4scale_12ep")))
    cfg.model = LazyCall(DINODetector)(
        network=set_classes(config["network"], len(names), "${model.num_classes}"),
        criterion=None,
        num_classes=len(names),
        pixel_mean=list(preprocessing.pixel_mean),
        pixel_std=list(preprocessing.pixel_std),
        max_detections=preprocessing.max_detections,
        input_range=preprocessing.input_range and list(preprocessing.input_range),
    )
    resize = LazyCall(ShortSide)(sizes=[preprocessing.short_side], max_size=preprocessing.max_size)
    cfg.dataloader.test.mapper.augmentations = [resize]
    cfg.train.init_checkpoint = path
    return cfg


def _plain(node: Any) -> Any:
    """Turn a config into JSON types: classes and functions become their names, other objects their `repr`."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return node if node is None or isinstance(node, str | int | float) else full_name(node)


def full_name(part: Any) -> str:
    """The dotted path of a class or function; the `repr` of anything else."""
    named = hasattr(part, "__qualname__") and hasattr(part, "__module__")
    return name_of(part) if named and "<" not in part.__qualname__ else repr(part)
