"""The description of a checkpoint of Detectron2's own programs, from the files of its run.

Their checkpoints hold nothing but weights. Beside them lies the recipe as `config.yaml`, whose YAML names Python
objects, and in `inference` what `dino.d2.data_loading.Evaluator` wrote. Neither is trusted: tags become text, an
interpolation can only name a setting of the same file, and the network passes the same checks as any other description.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dino.modeling.detector import Preprocessing
from dino.utils.files import DataError

from .folder_json import read_json

RECIPE, CLASSES = "config.yaml", "inference/classes.json"
_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")  # to another setting: relative with dots in front
_LONGEST_CHAIN = 20  # of references
_LONGEST_NUMBER = 100  # characters: those of base 60 take time by their square
_MOST_TEXT = 2**20  # bytes of a recipe: PyYAML takes a second for them


def describe_run(checkpoint: Path) -> dict[str, Any]:
    """Read the description of a checkpoint from the files of its run; {} where no recipe lies beside it.

    Args:
        checkpoint: the file.

    Returns:
        `about`, and `names` and `category_ids` where an evaluation has written them.

    Raises:
        DataError: the recipe can't be read, or describes no model.
    """
    path = checkpoint.parent / RECIPE
    if not path.is_file():
        return {}
    try:
        recipe = _read_yaml(path)
        about = {"config": json.dumps({"network": _resolve(recipe, ("model", "network"))}), **_describe_images(recipe)}
    except Exception as error:  # YAML can hold anything
        raise DataError(f"the recipe beside it, {path}, describes no model: {_reason(error)}") from error
    return {"about": about, **_read_classes(checkpoint.parent / CLASSES)}


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)[:200] or type(error).__name__


def _read_classes(path: Path) -> dict[str, Any]:
    """Names and ids of the classes, unchecked, from the file that an evaluation wrote."""
    found = read_json(path) if path.is_file() else {}
    return {key: found[key] for key in ("names", "category_ids") if key in found}


class _InertLoader(yaml.SafeLoader):
    """Reads YAML as plain data: of a Python object, its text or its list is kept. No node is shared."""

    def construct_scalar(self, node: Any) -> Any:
        if node.tag != "tag:yaml.org,2002:str" and len(node.value) > _LONGEST_NUMBER:
            raise DataError("it has a number of more than 100 digits")
        return super().construct_scalar(node)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise DataError("it refers to its own parts by aliases of YAML")
        return super().compose_node(parent, index)


def _inert(loader: _InertLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return suffix


_InertLoader.add_multi_constructor("tag:yaml.org,2002:python/", _inert)


def _read_yaml(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        text = file.read(_MOST_TEXT + 1)
    if len(text) > _MOST_TEXT:
        raise DataError(f"it has more than {_MOST_TEXT:,} bytes")
    found = yaml.load(text, _InertLoader)
    if not isinstance(found, dict):
        raise DataError("it holds no settings")
    if "MODEL" in found:
        raise DataError(
            "it is a config of Detectron2's older system, yacs: predict by DefaultPredictor with it, after "
            "dino.d2.add_dino_config(cfg)"
        )
    return found


def _describe_images(recipe: Mapping) -> dict[str, Any]:
    """`preprocessing` of a recipe: what its model expects of images, and the size of those that it is evaluated on."""
    model, usual = recipe["model"], Preprocessing()._asdict()
    stated = {key: _resolve(recipe, ("model", key)) for key in usual if key in model}
    augmentations = _resolve(recipe, ("dataloader", "test", "mapper", "augmentations"))
    for resize in [a for a in augmentations if "sizes" in a][-1:]:
        stated |= {"short_side": max(resize["sizes"]), "max_size": resize.get("max_size")}
    return {"preprocessing": usual | stated}


def _resolve(recipe: Mapping, keys: Sequence[Any]) -> Any:
    """The part of a recipe at these keys, with plain values in place of references."""
    value = _at(recipe, keys)
    if isinstance(value, dict):
        return {key: _resolve(recipe, (*keys, key)) for key in value}
    if isinstance(value, list):
        return [_resolve(recipe, (*keys, number)) for number in range(len(value))]
    return _follow(recipe, keys, value)


def _follow(recipe: Mapping, keys: Sequence[Any], value: Any) -> Any:
    """The value at these keys; of a reference, what it names: a plain value or a list of these.

    Raises:
        DataError: references name each other, or more than that: copies of copies would fill the memory.
    """
    for _ in range(_LONGEST_CHAIN):
        named = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if not named:
            break
        dots, rest = named.groups()
        keys = (*(keys[: -len(dots)] if dots else ()), *rest.split("."))
        value = _at(recipe, keys)
    if isinstance(value, dict) or "${" in str(value):
        raise DataError(f"it refers to {'.'.join(map(str, keys))[:100]}, which is no plain value")
    return value


def _at(recipe: Any, keys: Sequence[Any]) -> Any:
    for key in keys:
        recipe = recipe[int(key) if isinstance(recipe, list) else key]
    return recipe
