"""What a checkpoint says about its model, so that it can be built from the file alone; and the recipe made of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detectron2.config import LazyCall, LazyConfig
from detectron2.modeling import FPN, MViT, SimpleFeaturePyramid, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.utils.registry import _convert_target_to_string as name_of
from omegaconf import DictConfig, OmegaConf

from dino.modeling.detector import Preprocessing
from dino.utils.recipes import find_recipe
from dino.weights import read_content
from dino.weights.description import read_description

from .backbones import AsBackbone, regnet, vitdet
from .data_loading import ShortSide
from .meta_arch import DINODetector

# Parts with Detectron2's code that a checkpoint may name; see `dino.weights.description.PARTS`.
OF_DETECTRON2 = (FPN, LastLevelMaxPool, LastLevelP6P7, MViT, SimpleFeaturePyramid, SwinTransformer)
PARTS = {name_of(part): part for part in (*OF_DETECTRON2, AsBackbone, regnet, vitdet)}


def describe(cfg: DictConfig) -> dict[str, Any]:
    """The `about` of a checkpoint: the recipe's model as JSON text, and what it does to images, as plain data."""
    resizes = [a for a in cfg.dataloader.test.mapper.augmentations if "sizes" in a]
    size = {"short_side": int(max(resizes[-1].sizes)), "max_size": resizes[-1].get("max_size")} if resizes else {}
    model = {key: cfg.model[key] for key in ("pixel_mean", "pixel_std", "max_detections") if key in cfg.model}
    model = {key: [float(x) for x in value] if "pixel" in key else value for key, value in model.items()}
    return {
        "config": json.dumps(plain(OmegaConf.to_container(cfg.model, resolve=True))),
        "preprocessing": Preprocessing(**model, **size)._asdict(),
    }


def recipe_of(path: str | Path) -> DictConfig:
    """A recipe to evaluate a checkpoint with: COCO's, with the model of the file and what that expects of images.

    Raises:
        DataError: the file is missing, broken or unsafe, or does not describe its model.
    """
    config, names, preprocessing = read_description(read_content(path), path)
    cfg = LazyConfig.load(str(find_recipe("dino_r50_4scale_12ep")))
    cfg.model = LazyCall(DINODetector)(
        network=config["network"],
        criterion=None,
        num_classes=len(names),
        pixel_mean=list(preprocessing.pixel_mean),
        pixel_std=list(preprocessing.pixel_std),
        max_detections=preprocessing.max_detections,
    )
    resize = LazyCall(ShortSide)(sizes=[preprocessing.short_side], max_size=preprocessing.max_size)
    cfg.dataloader.test.mapper.augmentations = [resize]
    cfg.train.init_checkpoint = str(path)
    return cfg


def plain(node: Any) -> Any:
    """A config as JSON has it; classes and functions become their names, any other object what it prints."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node if node is None or isinstance(node, str | int | float) else full_name(node)


def full_name(part: Any) -> str:
    """Where a class or function can be imported from; for anything else, what it prints."""
    named = hasattr(part, "__qualname__") and hasattr(part, "__module__")
    return name_of(part) if named and "<" not in part.__qualname__ else repr(part)
