"""A recipe made from the description of a model that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from detectron2.config import LazyCall, LazyConfig
from omegaconf import DictConfig

from dino.training.recipe_nodes import full_name
from dino.training.recipe_parts import describe
from dino.utils.recipes import find_recipe
from dino.weights.description import check_network_size, read_description, set_classes
from dino.weights.inferred_description import open_checkpoint

from .data_loading import ShortSide
from .meta_arch import DINODetector

__all__ = ["describe", "describe_evaluation", "full_name", "recipe_of"]


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
