"""A network from its checkpoint alone, without a recipe and, where its backbone allows, without Detectron2.

A checkpoint of this project carries `names`, and under `about` the recipe's `model` as JSON text (`config`) and what is
done to images (`preprocessing`). Files are not trusted: what they describe is built from the parts listed here, and
nothing in a description can name another class, a file or an address.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dino.modeling
from dino.layers import ContrastiveDenoising, SinePositionEncoding
from dino.modeling import DINO, TorchvisionBackbone, variants
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError

from . import load_weights, read_content

TEXT = re.compile(r"[\w.+-]*")  # what any text of a description may consist of: no path and no address
FETCHING = re.compile(r"pretrained.*|weights.*|checkpoint.*|cache_dir|file|.*(url|hub).*")  # arguments that name files


class Rebuilt(NamedTuple):
    """What `model_from_checkpoint` returns."""

    network: DINO  # in evaluation mode, on the CPU
    names: list[str]  # of the classes
    preprocessing: Preprocessing


def detector_from_checkpoint(path: str | Path, copy: str = "auto") -> Detector:
    """Rebuild the `Detector` of a checkpoint; arguments and errors of `model_from_checkpoint`."""
    network, names, preprocessing = model_from_checkpoint(path, copy=copy)
    return Detector(network, preprocessing, names).eval()


def model_from_checkpoint(path: str | Path, *, copy: str = "auto") -> Rebuilt:
    """Rebuild the network of a checkpoint with its weights.

    Detectron2's ResNets are rebuilt from torchvision's; its other backbones need Detectron2.

    Args:
        path: a file that this project wrote (training, `tools/plain_train.py`, `dino convert`).
        copy: "model", "ema" or "auto", as of `load_weights`.

    Raises:
        DataError: the file is missing, broken or unsafe, carries no description, or asks for a part that is not on the
            list, or for Detectron2 where that is not installed.
    """
    content = read_content(path)
    config, names, preprocessing = read_description(content, path)
    try:
        network = build_network(config)
    except DataError as error:
        raise DataError(f"can't rebuild the model of {path}: {error}") from error
    except Exception as error:  # wrong arguments can raise anything
        raise DataError(f"can't rebuild the model of {path}: {type(error).__name__}: {str(error)[:300]}") from error
    problems = load_weights(network, content, copy=copy, name=str(path)).problems
    if problems:
        raise DataError(f"{path} does not hold all of its own model: {', '.join(problems[:3])}")
    if len(names) != len(network.decoder.class_heads[0].bias):
        raise DataError(f"{path} has {len(names)} names for {len(network.decoder.class_heads[0].bias)} classes")
    return Rebuilt(network.eval(), names, preprocessing)


def read_description(content: Mapping, path: str | Path) -> tuple[dict, list[str], Preprocessing]:
    """What the content of a checkpoint says about its model: the config, of which `network` is checked, and the names.

    Raises:
        DataError: see `model_from_checkpoint`.
    """
    about, names = content.get("about"), content.get("names")
    if not isinstance(about, Mapping) or not isinstance(about.get("config"), str) or not is_list_of(names, str):
        raise DataError(
            f"{path} does not say how to build its model: only checkpoints of this project do. Files of other programs "
            "become such with `dino convert`"
        )
    try:
        preprocessing = read_preprocessing(about.get("preprocessing"))
        config = json.loads(about["config"])
        check(config["network"])
    except DataError as error:
        raise DataError(f"can't rebuild the model of {path}: {error}") from error
    except Exception as error:  # JSON can hold anything
        raise DataError(f"can't rebuild the model of {path}: {type(error).__name__}: {str(error)[:300]}") from error
    return config, list(names), preprocessing


def build_network(config: Mapping) -> DINO:
    """The `network` of a description that was checked, with random weights.

    Raises:
        DataError: it is no DINO.
    """
    network = build(config["network"])
    if not isinstance(network, DINO):
        raise DataError(f"a DINO was expected, not {type(network).__name__}")
    return network


def check(node: Any) -> None:
    """Raise a DataError where a description asks for what is not allowed; see `model_from_checkpoint`."""
    if isinstance(node, str) and not TEXT.fullmatch(node):
        raise DataError(f"{node!r} is no plain word; addresses and paths are not followed")
    if isinstance(node, list):
        for child in node:
            check(child)
    if not isinstance(node, dict):
        return
    if fetching := [key for key, value in node.items() if FETCHING.fullmatch(key) and value]:
        raise DataError(f"the argument {fetching[0]!r} would read or download another file, which is not done")
    for key, value in node.items():
        find_part(value) if key == "_target_" else check(value)


def build(node: Any) -> Any:
    """What a description says: parts of the list for dicts with a `_target_`; containers and plain values as they are.

    The description was checked.
    """
    if isinstance(node, list):
        return [build(child) for child in node]
    if not isinstance(node, dict):
        return node
    part = find_part(node["_target_"]) if "_target_" in node else dict
    return part(**{key: build(value) for key, value in node.items() if key != "_target_"})


def find_part(target: Any) -> Callable:
    """The class or function of the list that goes by the name `target`.

    Raises:
        DataError: it is not on the list, or needs Detectron2.
    """
    if not isinstance(target, str):
        raise DataError(f"{str(target)[:100]!r} is no name of a part")
    parts = PARTS
    if target not in parts and target.startswith(("detectron2.", "dino.d2.")):
        try:
            from dino.d2.recipe_description import PARTS as parts
        except ImportError as error:
            raise DataError(
                f"{target} needs Detectron2, which is not installed here ({error}). README.md says how to install it; "
                "ResNets and the backbones of torchvision and timm do without"
            ) from error
    if target not in parts:
        raise DataError(f"{target[:100]!r} is not on the list of parts that a checkpoint may ask for")
    return parts[target]


class Stages(NamedTuple):
    """The arguments of Detectron2's `ResNet.make_default_stages`."""

    depth: int
    norm: str = "BN"
    stride_in_1x1: bool = False


def torchvision_resnet(
    *, stem: str, stages: Stages, out_features: Sequence[str], freeze_at: int = 0
) -> TorchvisionBackbone:
    """Detectron2's ResNet from torchvision's, which computes the same; the frozen part does not matter here."""
    norm = {"SyncBN": "BN"}.get(stages.norm, stages.norm)
    if stages.stride_in_1x1 or norm not in ("BN", "FrozenBN") or stem not in ("BN", "FrozenBN", "SyncBN"):
        raise DataError(f"a ResNet with {stages} is not torchvision's: Detectron2 would be needed")
    return TorchvisionBackbone(f"resnet{stages.depth}", out_features=out_features, norm=norm)


def resnet_stem(*, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> str:
    """The norm of Detectron2's `BasicStem`."""
    if (in_channels, out_channels) != (3, 64):
        raise DataError("a ResNet with another stem than torchvision's can't be rebuilt")
    return norm


# All that a checkpoint may ask for. To add a part of the network, export it from `dino.modeling` or its `variants`.
PARTS: dict[str, Callable] = {
    **{f"dino.modeling.{name}": getattr(dino.modeling, name) for name in dino.modeling.__all__},
    **{f"dino.modeling.variants.{name}": getattr(variants, name) for name in variants.__all__},
    "dino.layers.ContrastiveDenoising": ContrastiveDenoising,
    "dino.layers.SinePositionEncoding": SinePositionEncoding,
    "detectron2.modeling.ResNet": torchvision_resnet,
    "detectron2.modeling.ResNet.make_default_stages": Stages,
    "detectron2.modeling.backbone.BasicStem": resnet_stem,
}


def read_preprocessing(values: Any) -> Preprocessing:
    """Check what a checkpoint says about images.

    Raises:
        DataError: a value is missing, unknown, or makes no sense.
    """
    if not isinstance(values, Mapping) or set(values) != set(Preprocessing._fields):
        raise DataError(f"preprocessing must be a dict of {', '.join(Preprocessing._fields)}")
    read = Preprocessing(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()})
    for name in ("pixel_mean", "pixel_std"):
        value = getattr(read, name)
        if not is_list_of(value, (int, float)) or len(value) != 3 or (name == "pixel_std" and min(value) <= 0):
            raise DataError(f"preprocessing: {name} is {value!r}, three numbers were expected")
    for name in ("short_side", "max_size", "max_detections"):
        value = getattr(read, name)
        if not (type(value) is int and value > 0) and not (name == "max_size" and value is None):
            raise DataError(f"preprocessing: {name} is {value!r}, a positive number was expected")
    return read


def is_list_of(value: Any, kind: type | tuple) -> bool:
    """Whether `value` is a list or tuple of nothing but `kind`, and not empty."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)
