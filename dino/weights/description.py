"""A network or a `Detector` from its checkpoint alone: no recipe, and for most backbones no Detectron2.

A checkpoint of this project has `names` and `category_ids` of the classes, and under `about` the recipe's `model` as
JSON text (`config`) and what the network expects of its images (`preprocessing`). Files are not trusted: a description
can build the parts listed here and nothing else, and can't name a file or an address.
"""

from __future__ import annotations

import importlib
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dino.modeling
from dino.layers import ContrastiveDenoising, SinePositionEncoding
from dino.modeling import DINO, TorchvisionBackbone, variants
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError

from .checkpoint_formats import recognise
from .class_rows import check_known
from .detector_backbones import name_any_detector
from .inferred_description import open_checkpoint
from .load_report import Report
from .loading import load_weights
from .names import StateDict
from .reading import average_of, weights_of
from .size_check import SizeGuard, check_size

_WORD = re.compile(r"[\w.+-]{0,200}")  # any text of a description: no path and no address
_NAMED = ("dino.modeling.variants.Branches", "dino.modeling.variants.branches.Branches")  # of parts with any names
_MOST_NAMES, _LONGEST_NAME = 100_000, 1000  # classes; characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LONGEST_CONFIG, _LONGEST_LIST, _DEEPEST = 2**20, 1000, 30  # characters, items, nested parts
_LARGEST = 1_000_000  # any number of a description
_LAYERS = re.compile(r"layers|levels|depth|blocks|repeat")  # arguments that count modules,
_MOST_LAYERS = 1000
_FETCHING = re.compile(r"pretrained.*|weights.*|checkpoint.*|cache_dir|file|.*(url|hub).*")  # arguments that name files


class _ModelFromCheckpoint(NamedTuple):
    """The result of `model_from_checkpoint`."""

    network: DINO  # in evaluation mode, on the CPU
    names: list[str]  # of the classes
    preprocessing: Preprocessing


def detector_from_checkpoint(path: str | Path, copy: str = "auto") -> Detector:
    """Build the `Detector` of a checkpoint: network, weights, class names and preprocessing.

    Arguments and errors as of `model_from_checkpoint`.

    Returns:
        the detector, in evaluation mode, on the CPU.
    """
    path, content = open_checkpoint(path)
    network, names, preprocessing = _build_model(content, path, copy)
    return Detector(network, preprocessing, names, category_ids=_read_category_ids(content, path)).eval()


def model_from_checkpoint(path: str | Path, *, copy: str = "auto") -> _ModelFromCheckpoint:
    """Build the network of a checkpoint with its weights.

    torchvision's ResNets replace Detectron2's. Other backbones of Detectron2 need Detectron2.

    Args:
        path: a checkpoint of this or another program: a file, an address, the name of published weights, or the folder
            of a run, see `dino.weights.locate`.
        copy: "model", "ema" or "auto", as of `load_weights`.

    Raises:
        DataError: the file is missing, broken or unsafe; it has no description; or the description asks for a part that
            is not on the list, or for Detectron2 where that is not installed.
    """
    path, content = open_checkpoint(path)
    return _build_model(content, path, copy)


def detector_for_classes(
    content: Mapping, path: str | Path, names: Sequence[str], *, copy: str = "auto"
) -> tuple[Detector, Report]:
    """Build the `Detector` of a checkpoint for the classes of a data set, and report on its weights.

    The detector has the rows of these classes, by name. As many other names leave all rows in place.

    Args:
        content: of the file, see `open_checkpoint`.
        path: the file, for messages.
        names: of the classes of the data.
        copy: "model", "ema" or "auto", as of `load_weights`.

    Returns:
        the detector, in evaluation mode, on the CPU; and the report.

    Raises:
        DataError: see `model_from_checkpoint`; or the data has classes that the model lacks.
    """
    config, known, preprocessing = read_description(content, path)
    check_known(known, names, path)
    network = _build_bounded(config, content, path, copy, len(names) if len(names) != len(known) else None)
    report = load_weights(network, content, copy=copy, name=str(path), classes=names)
    _check_whole(report, path)
    _check_heads(network, names, path)
    return Detector(network, preprocessing, names).eval(), report


def set_classes(node: Any, classes: int, wanted: Any) -> Any:
    """Give the parts of a description that have this number of `classes` the `wanted` number."""
    if isinstance(node, list):
        return [set_classes(child, classes, wanted) for child in node]
    if not isinstance(node, dict):
        return node
    follows = {"num_classes": wanted} if node.get("num_classes") == classes else {}
    return {key: set_classes(child, classes, wanted) for key, child in node.items()} | follows


def _build_bounded(config: dict, content: Mapping, path: str | Path, copy: str, classes: int | None = None) -> DINO:
    """Build the network of a file, no larger than its weights, with random ones; for fewer `classes` than the file's.

    Raises:
        DataError: it is larger, or can't be built.
    """
    compared = check_network_size(config, content, path, copy)
    node = config["network"] if classes is None else set_classes(config["network"], len(content["names"]), classes)
    try:
        with nullcontext() if compared else SizeGuard(_all_weights(content, copy)):
            return build_network({"network": node})
    except Exception as error:  # wrong arguments can raise anything
        raise _cannot_build(path, error) from error


def _check_whole(report: Report, path: str | Path) -> None:
    """Raise a DataError if a file lacked tensors of its own model."""
    if report.fresh:
        raise DataError(f"{path} lacks weights of its own model: {', '.join(list(report.fresh)[:3])}")


def _check_heads(network: DINO, names: Sequence[str], path: str | Path) -> None:
    """Raise a DataError unless a network has a name for each of its classes."""
    classes = len(network.decoder.class_heads[0].bias)
    if len(names) != classes:
        raise DataError(f"{path} has {len(names)} names for {classes} classes")


def _build_model(content: Mapping, path: str | Path, copy: str) -> _ModelFromCheckpoint:
    """`model_from_checkpoint` for the content of a file."""
    config, names, preprocessing = read_description(content, path)
    network = _build_bounded(config, content, path, copy)
    _check_whole(load_weights(network, content, copy=copy, name=str(path)), path)
    _check_heads(network, names, path)
    return _ModelFromCheckpoint(network.eval(), names, preprocessing)


def _name_kind(content: Mapping) -> str:
    """What a file without a description seems to be, for a message; "" where nothing shows."""
    with suppress(ValueError):  # a DataError too
        state = weights_of(content)
        if recognise(state) == "own":
            return (
                ": it is a bare state dict. Evaluate the checkpoint of another training program with its recipe, dino "
                "eval FILE --config-file RECIPE; convert the original of a converted file again (detrex' with "
                "--temperature and --offset)"
            )
        return f": it is {name_any_detector(state) or 'no detector'}"
    return ""


def check_network_size(config: Mapping, content: Mapping, path: str | Path, copy: str = "auto") -> bool:
    """Check that a described network is not larger than the weights of its file, before memory is taken for it.

    Args:
        config: of `read_description`.
        content: of `read_content`.
        path: the file, for messages.
        copy: "model", "ema" or "auto", as of `load_weights`.

    Returns:
        as of `check_size`.

    Raises:
        DataError: it is larger, or can't be built.
    """
    try:
        return check_size(lambda: build_network(config), _all_weights(content, copy))
    except Exception as error:  # wrong arguments can raise anything
        raise _cannot_build(path, error) from error


def _all_weights(content: Mapping, copy: str) -> StateDict:
    """The tensors of a file and of their running average; none of a file without weights."""
    found: StateDict = {}
    for read in (weights_of, partial(average_of, copy=copy)):
        with suppress(DataError):
            found |= read(content) or {}
    return found


def read_description(content: Mapping, path: str | Path) -> tuple[dict, list[str], Preprocessing]:
    """Read the config, the class names and the preprocessing from the content of a checkpoint, and check them.

    Raises:
        DataError: see `model_from_checkpoint`.
    """
    about, names = content.get("about"), content.get("names")
    if not isinstance(about, Mapping) or not isinstance(about.get("config"), str) or not _is_list_of(names, str):
        raise DataError(
            f"{path} does not describe its model{_name_kind(content)}. Give a detector's checkpoint; of others' "
            "files, `dino convert` says what they lack"
        )
    try:
        _check_names(names)
        preprocessing = _read_preprocessing(about.get("preprocessing"))
        config = _read_config(about["config"])
    except Exception as error:  # JSON can hold anything
        raise _cannot_build(path, error) from error
    return config, list(names), preprocessing


def _check_names(names: Sequence[str]) -> None:
    """Raise a DataError for class names that no data set has."""
    if len(names) > _MOST_NAMES:
        raise DataError(f"{len(names):,} names of classes: at most {_MOST_NAMES:,} were expected")
    odd = next((name for name in names if len(name) > _LONGEST_NAME or _CONTROL.search(name)), None)
    if odd is not None:
        raise DataError(f"the class name {odd[:50]!r} is longer than {_LONGEST_NAME}, or has control characters")


def _read_config(text: str) -> dict:
    """Read and check the `config` of a description.

    Raises:
        DataError: see `model_from_checkpoint`.
    """
    if len(text) > _LONGEST_CONFIG:
        raise DataError(f"a description of {len(text):,} characters: at most {_LONGEST_CONFIG:,} were expected")
    config = json.loads(text)
    _check(config["network"])
    return config


def _read_category_ids(content: Mapping, path: str | Path) -> list[int]:
    """Read the ids of the classes in the data set, by label: 1, 2, … in files from before they were stored.

    Raises:
        DataError: they are no ids, or not one for each class.
    """
    names = content.get("names") or ()
    ids = content.get("category_ids", list(range(1, len(names) + 1)))
    whole = isinstance(ids, list | tuple) and all(type(number) is int and abs(number) < 2**63 for number in ids)
    if not whole or len(set(ids)) != len(ids) or len(ids) != len(names):
        raise DataError(f"{path}: category_ids must be {len(names)} different whole numbers, one for each class")
    return list(ids)


def _cannot_build(path: str | Path, error: Exception) -> DataError:
    why = error if isinstance(error, DataError) else f"{type(error).__name__}: {str(error)[:300]}"
    return DataError(f"can't build the model of {path}: {why}")


def build_network(config: Mapping) -> DINO:
    """Build the `network` of a checked description, with random weights.

    Raises:
        DataError: the result is no DINO.
    """
    network = _build(config["network"])
    if not isinstance(network, DINO):
        raise DataError(f"a DINO was expected, not {type(network).__name__}")
    return network


def _check(node: Any, key: str = "", depth: int = 0) -> None:
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
            _check(child, key, depth + 1)
    if isinstance(node, dict):
        _check_arguments(node, depth)


def _check_number(number: float, key: str) -> None:
    """Raise a DataError for a number beyond all networks: they would take minutes to count it off."""
    most = _MOST_LAYERS if _LAYERS.search(key) else _LARGEST
    if not abs(number) <= most:  # NaN too
        raise DataError(f"{key[:100]!r} is {str(number)[:30]}: a number of at most {most:,} was expected")


def _check_arguments(node: dict, depth: int) -> None:
    """`_check` for a part and its arguments."""
    for key, value in node.items():
        named = node.get("_target_") in _NAMED and isinstance(value, dict)
        if _FETCHING.fullmatch(key) and value and not named:
            raise DataError(f"the argument {key[:100]!r} would read or download another file: a description can't")
        if key == "_target_":
            _find_part(value)
        else:
            _check(value, key, depth + 1)


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
            "dino/weights/description.py"
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
    """The arguments of Detectron2's `ResNet.make_default_stages`."""

    depth: int
    norm: str = "BN"
    stride_in_1x1: bool = False


def _torchvision_resnet(
    *, stem: str, stages: _Stages, out_features: Sequence[str], freeze_at: int = 0
) -> TorchvisionBackbone:
    """Detectron2's ResNet from torchvision's, which computes the same.

    Args:
        freeze_at: 1 does not train the stem, 2 neither `res2`, and so on.
    """
    norm = {"SyncBN": "BN"}.get(stages.norm, stages.norm)
    if stages.stride_in_1x1 or norm not in ("BN", "FrozenBN") or stem not in ("BN", "FrozenBN", "SyncBN"):
        raise DataError(f"a ResNet with {tuple(stages)} is not torchvision's: Detectron2 would be needed")
    freeze = [*("conv1", "bn1")[: 2 * freeze_at], *(f"layer{stage}" for stage in range(1, min(freeze_at, 5)))]
    return TorchvisionBackbone(f"resnet{stages.depth}", out_features=out_features, norm=norm, freeze=freeze)


def _resnet_stem(*, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> str:
    """The norm of Detectron2's `BasicStem`."""
    if (in_channels, out_channels) != (3, 64):
        raise DataError("a ResNet with another stem than torchvision's can't be built")
    return norm


_NETWORK = "DINO ChannelMapper Decoder Encoder QuerySelection SharedHeadsDecoder build_dino share_heads"
_OF_MODELING = [*_NETWORK.split(), "TimmBackbone", "TorchvisionBackbone"]
# All that a checkpoint may ask for. To add a part of the network, name it here, or export it from `modeling.variants`.
PARTS: dict[str, Callable] = {
    **{f"dino.modeling.{name}": getattr(dino.modeling, name) for name in _OF_MODELING},
    **{f"dino.modeling.variants.{name}": getattr(variants, name) for name in variants.__all__},
    **{f"{getattr(variants, name).__module__}.{name}": getattr(variants, name) for name in variants.__all__},
    "dino.layers.ContrastiveDenoising": ContrastiveDenoising,
    "dino.layers.SinePositionEncoding": SinePositionEncoding,
    "detectron2.modeling.ResNet": _torchvision_resnet,
    "detectron2.modeling.ResNet.make_default_stages": _Stages,
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


def _read_preprocessing(values: Any) -> Preprocessing:
    """Check what a checkpoint says about images.

    Raises:
        DataError: a value is missing, unknown, or makes no sense.
    """
    if not isinstance(values, Mapping) or {*values, *_ADDED} != set(Preprocessing._fields):
        raise DataError(f"preprocessing must be a dict of {', '.join(Preprocessing._fields)}")
    for name, value in values.items():
        expected, fits = _EXPECTED[name]
        if not fits(value):
            raise DataError(f"preprocessing: {name} is {reprlib.repr(value)}, but {expected} was expected")
    return Preprocessing(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()})


def _is_list_of(value: Any, kind: type | tuple) -> bool:
    """Whether `value` is a list or tuple of nothing but `kind`, and not empty."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)


def _are_colors(value: Any, least: float, most: float) -> bool:
    """Whether `value` is a list of three numbers from `least` to `most`; NaN is none."""
    return _is_list_of(value, (int, float)) and len(value) == 3 and all(least <= number <= most for number in value)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _is_range(value: Any) -> bool:
    numbers = _is_list_of(value, (int, float)) and len(value) == 2
    return numbers and -1e12 <= value[0] < value[1] <= 1e12 and value[1] - value[0] > 1e-12


# Field of `Preprocessing` -> what a message calls its values, and the test of a value.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "pixel_mean": ("a list of three numbers from -10,000 to 10,000", lambda value: _are_colors(value, -1e4, 1e4)),
    "pixel_std": ("a list of three numbers from 0.001 to 10,000", lambda value: _are_colors(value, 1e-3, 1e4)),
    "short_side": ("an integer from 1 to 10,000", lambda value: _is_count(value, 10_000)),
    "max_size": ("an integer from 1 to 20,000, or null", lambda value: value is None or _is_count(value, 20_000)),
    "max_detections": ("an integer from 1 to 100,000", lambda value: _is_count(value, 100_000)),
    "input_range": ("two rising numbers or null", lambda value: value is None or _is_range(value)),
}
_ADDED = {"input_range"}  # fields that files from before do not have
