"""What a description may ask for, and the network built from it: files are not trusted.

A description is a tree of dicts: `_target_` names a part of `PARTS`, all else are its arguments.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import dino.modeling
from dino.layers import ContrastiveDenoising, SinePositionEncoding
from dino.modeling import DINO, TorchvisionBackbone, variants
from dino.utils.files import DataError

_WORD = re.compile(r"[\w.+-]{0,200}")  # any text of a description: no path and no address
_NAMED = ("dino.modeling.variants.Branches", "dino.modeling.variants.branches.Branches")  # of parts with any names
_LONGEST_LIST, _DEEPEST = 1000, 30  # items, nested parts
_LARGEST = 1_000_000  # any number of a description
_LAYERS = re.compile(r"layers|levels|depth|blocks|repeat")  # arguments that count modules,
_MOST_LAYERS = 1000
_FETCHING = re.compile(r"pretrained.*|weights.*|checkpoint.*|cache_dir|file|.*(url|hub).*")  # arguments that name files


def set_classes(node: Any, classes: int, wanted: Any) -> Any:
    """Give the parts of a description that have this number of `classes` the `wanted` number."""
    if isinstance(node, list):
        return [set_classes(child, classes, wanted) for child in node]
    if not isinstance(node, dict):
        return node
    follows = {"num_classes": wanted} if node.get("num_classes") == classes else {}
    return {key: set_classes(child, classes, wanted) for key, child in node.items()} | follows


def build_network(config: Mapping) -> DINO:
    """Build the `network` of a checked description, with random weights.

    Raises:
        DataError: the result is no DINO.
    """
    network = _build(config["network"])
    if not isinstance(network, DINO):
        raise DataError(f"a DINO was expected, not {type(network).__name__}")
    return network


def check_description(node: Any, key: str = "", depth: int = 0) -> None:
    """Raise a DataError where a description asks for what is not allowed; see `model_from_checkpoint`.

    Args:
        node: a part, an argument or a list of these.
        key: the name of the argument.
        depth: parts and lists around it.
    """
    if depth > _DEEPEST:
        raise DataError(f"the description nests parts more than {_DEEPEST} deep")
    if isinstance(node, str) and not _WORD.fullmatch(node):
        raise DataError(f"{node[:100]!r} is no plain word: a description can't name addresses and paths")
    if isinstance(node, int | float):
        _check_number(node, key)
    if isinstance(node, list):
        if len(node) > _LONGEST_LIST:
            raise DataError(f"{key[:100]!r} is a list of {len(node):,} items: at most {_LONGEST_LIST} were expected")
        for child in node:
            check_description(child, key, depth + 1)
    if isinstance(node, dict):
        _check_arguments(node, depth)


def _check_number(number: float, key: str) -> None:
    """Raise a DataError for a number beyond all networks: they would take minutes to count it off."""
    most = _MOST_LAYERS if _LAYERS.search(key) else _LARGEST
    if not abs(number) <= most:  # NaN too
        raise DataError(f"{key[:100]!r} is {str(number)[:30]}: a number of at most {most:,} was expected")


def _check_arguments(node: dict, depth: int) -> None:
    """`check_description` for a part and its arguments."""
    for key, value in node.items():
        named = node.get("_target_") in _NAMED and isinstance(value, dict)
        if _FETCHING.fullmatch(key) and value and not named:
            raise DataError(f"the argument {key[:100]!r} would read or download another file: a description can't")
        if key == "_target_":
            _find_part(value)
        else:
            check_description(value, key, depth + 1)


def _build(node: Any) -> Any:
    """Build a checked description: parts of the list from dicts with a `_target_`, everything else as it is."""
    if isinstance(node, list):
        return [_build(child) for child in node]
    if not isinstance(node, dict):
        return node
    part = _find_part(node["_target_"]) if "_target_" in node else dict
    return part(**{key: _build(value) for key, value in node.items() if key != "_target_"})


def _find_part(target: Any) -> Callable:
    """The class or function that the list has under the name `target`.

    Raises:
        DataError: the list has no such name, or the part needs Detectron2.
    """
    if not isinstance(target, str):
        raise DataError(f"{str(target)[:100]!r} is no name of a part")
    if target in PARTS:
        return PARTS[target]
    if target not in _PARTS_OF_DETECTRON2:
        raise DataError(
            f"{target[:100]!r} is not on the list of parts that a checkpoint may ask for, PARTS of "
            "dino/weights/network_parts.py"
        )
    module, _, attribute = _PARTS_OF_DETECTRON2[target].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise DataError(
            f"{target} needs Detectron2, which is not installed here ({error}). README.md says how to install it. "
            "ResNets and the backbones of torchvision and timm do without"
        ) from error


class _Stages(NamedTuple):
    """The arguments of Detectron2's `ResNet.make_default_stages`, and the maps that `dilated_stages` dilates."""

    depth: int
    norm: str = "BN"
    stride_in_1x1: bool = False
    dilated: Sequence[str] = ()


def _torchvision_resnet(**arguments: Any) -> TorchvisionBackbone:
    """Detectron2's ResNet from torchvision's, which computes the same."""
    return TorchvisionBackbone(**_resnet_arguments(**arguments))


def _resnet_arguments(*, stem: str, stages: _Stages, out_features: Sequence[str], freeze_at: int = 0) -> dict[str, Any]:
    """The arguments of a `TorchvisionBackbone` for those of Detectron2's ResNet.

    Args:
        freeze_at: 1 does not train the stem, 2 neither `res2`, and so on.
    """
    norm = {"SyncBN": "BN"}.get(stages.norm, stages.norm)
    if stages.stride_in_1x1 or norm not in ("BN", "FrozenBN") or stem not in ("BN", "FrozenBN", "SyncBN"):
        raise DataError(f"a ResNet with {tuple(stages)} is not torchvision's: Detectron2 would be needed")
    freeze = [*("conv1", "bn1")[: 2 * freeze_at], *(f"layer{stage}" for stage in range(1, min(freeze_at, 5)))]
    dilated = {"dilated": list(stages.dilated)} if stages.dilated else {}
    return {"name": f"resnet{stages.depth}", "out_features": out_features, "norm": norm, "freeze": freeze, **dilated}


def without_detectron2(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A described ResNet of Detectron2 as torchvision's; any other part as it is.

    Raises:
        DataError: torchvision has no such ResNet.
    """
    if node.get("_target_") != _RESNET:
        return node
    arguments = {key: _build(value) for key, value in node.items() if key != "_target_"}
    return {"_target_": "dino.modeling.TorchvisionBackbone", **_resnet_arguments(**arguments)}


def _resnet_stem(*, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> str:
    """The norm of Detectron2's `BasicStem`."""
    if (in_channels, out_channels) != (3, 64):
        raise DataError("a ResNet with another stem than torchvision's can't be built")
    return norm


_RESNET = "detectron2.modeling.ResNet"
_NETWORK = "DINO ChannelMapper Decoder Encoder QuerySelection SharedHeadsDecoder build_dino share_heads"
_OF_MODELING = [*_NETWORK.split(), "TimmBackbone", "TorchvisionBackbone"]
# All that a checkpoint may ask for. To add a part of the network, name it here, or export it from `modeling.variants`.
PARTS: dict[str, Callable] = {
    **{f"dino.modeling.{name}": getattr(dino.modeling, name) for name in _OF_MODELING},
    **{f"dino.modeling.variants.{name}": getattr(variants, name) for name in variants.__all__},
    **{f"{getattr(variants, name).__module__}.{name}": getattr(variants, name) for name in variants.__all__},
    "dino.layers.ContrastiveDenoising": ContrastiveDenoising,
    "dino.layers.SinePositionEncoding": SinePositionEncoding,
    _RESNET: _torchvision_resnet,
    "detectron2.modeling.ResNet.make_default_stages": _Stages,
    "dino.d2.detectron2_backbones.dilated_stages": partial(_Stages, dilated=("res5",)),
    "detectron2.modeling.backbone.BasicStem": _resnet_stem,
}
# The parts that need Detectron2, as module:attribute. Strings, because the module is imported only for a file that asks
# for the part.
_PARTS_OF_DETECTRON2 = {
    "detectron2.modeling.FPN": "detectron2.modeling:FPN",
    "detectron2.modeling.MViT": "detectron2.modeling:MViT",
    "detectron2.modeling.SimpleFeaturePyramid": "detectron2.modeling:SimpleFeaturePyramid",
    "detectron2.modeling.SwinTransformer": "detectron2.modeling:SwinTransformer",
    "detectron2.modeling.backbone.fpn.LastLevelMaxPool": "detectron2.modeling.backbone.fpn:LastLevelMaxPool",
    "detectron2.modeling.backbone.fpn.LastLevelP6P7": "detectron2.modeling.backbone.fpn:LastLevelP6P7",
    **{
        f"dino.d2.{module}.{name}": f"dino.d2.detectron2_backbones:{name}"
        for module in ("backbones", "detectron2_backbones")  # the former name and the present one
        for name in ("AsBackbone", "regnet", "vitdet")
    },
}
