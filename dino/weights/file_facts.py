"""What a weight file says about the model that it was trained in, besides the weights: read before a model is built."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.serialization import config as serialization

from dino.utils.files import DataError

from .checkpoint_formats import convert, recognise
from .mmdetection import MMDETECTION_POSITION, position_of
from .names import StateDict
from .published import find_source
from .reading import read_content, weights_of

_HEADS = re.compile(r"(decoder\.(?:class|box)_heads\.)\d+(\..+)")
_DECODERS = {"dino.modeling.Decoder": False, "dino.modeling.SharedHeadsDecoder": True}  # whether it shares its heads
_MOST = 1e6  # absolute value of a number that is believed


class Position(NamedTuple):
    """Constants of the sine position encoding, see `SinePositionEncoding`."""

    temperatures: tuple[float, float]
    offset: float


_USUAL = {"mmdetection": Position((MMDETECTION_POSITION[0],) * 2, MMDETECTION_POSITION[1])}


class FileFacts(NamedTuple):
    """What a file says, or its tensors show; None where they don't.

    Args:
        format: of `recognise`; "backbone" for weights without a detector.
        shared_heads: whether one pair of heads serves all decoder layers.
        position: constants of the position encoding.
        pixel_mean, pixel_std: normalisation of the images (values 0 to 255).
        map_norm: that of a `TorchvisionBackbone` or `TimmBackbone`.
    """

    format: str = "backbone"
    shared_heads: bool | None = None
    position: Position | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    map_norm: str | None = None


def read_facts(path: str | Path) -> FileFacts:
    """Read what a file says. Tensors are mapped into memory, so most of them are not read.

    Raises:
        DataError: as of `read_content`, or the file has no weights.
    """
    try:
        with serialization.patch("load.mmap", True):
            content = read_content(path)
    except DataError:  # files in PyTorch's old form can't be mapped
        content = read_content(path)
    return facts_of(content, path)


def facts_of(content: Mapping[str, Any], path: str | Path = "") -> FileFacts:
    """Find what the content of a file says.

    Args:
        content: of `read_content`.
        path: of the file, whose name may be that of a published one.

    Raises:
        DataError: the file has no weights, or contradicts itself.
    """
    state = weights_of(content)
    found = recognise(state)
    if found is None:
        return FileFacts()
    about = content.get("about") if found == "own" else None
    about = about if isinstance(about, Mapping) else {}
    network = _network(about)
    pixels = about.get("preprocessing")
    pixels = pixels if isinstance(pixels, Mapping) else {}
    own = convert(state)
    return FileFacts(
        format=found,
        shared_heads=_shared_heads(content, own, network),
        position=_described_position(network) if found == "own" else find_position(content, found, path),
        pixel_mean=_numbers(pixels.get("pixel_mean"), 3),
        pixel_std=_numbers(pixels.get("pixel_std"), 3, positive=True),
        map_norm=_map_norm(own),
    )


def _map_norm(own: StateDict) -> str | None:
    """Whether the backbone has norms of its maps; None for the backbones of other libraries and programs."""
    if any(name.startswith("neck.backbone.norms.res") for name in own):
        return "LN"
    return "none" if any(name.startswith("neck.backbone.body.") for name in own) else None


def _network(about: Mapping) -> Mapping:
    """The network of a description; {} where there is none."""
    try:
        network = json.loads(about["config"])["network"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return network if isinstance(network, Mapping) else {}


def _shared_heads(content: Mapping, own: StateDict, network: Mapping) -> bool | None:
    """What a training says of the network that it trains; else, whether the layers have equal heads."""
    decoder = network.get("decoder")
    target = decoder.get("_target_") if isinstance(decoder, Mapping) else None
    if "trainer" in content and isinstance(target, str) and target in _DECODERS:
        return _DECODERS[target]
    return has_shared_heads(own)


def has_shared_heads(own: StateDict) -> bool | None:
    """Whether all decoder layers of a state dict in own format have equal heads; None for a single layer."""
    pairs = [
        (own.get(f"{m[1]}0{m[2]}"), own[m[0]]) for m in map(_HEADS.fullmatch, own) if m and m[0] != f"{m[1]}0{m[2]}"
    ]
    return all(_are_equal(first, other) for first, other in pairs) if pairs else None


def _are_equal(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and torch.equal(a, b)


def _described_position(network: Mapping) -> Position | None:
    node = network.get("position_encoding")
    node = node if isinstance(node, Mapping) else {}
    return _as_position(node.get("temperatures"), node.get("offset"))


def find_position(content: Mapping[str, Any], format_: str, source: str | Path) -> Position | None:
    """Find the constants of the position encoding of another program's file.

    In this order: what the file states (the official program's `args`, mmdetection's config), what is published of the
    file, what is usual in the format.

    Args:
        content: of `read_content`.
        format_: of the file, see `recognise`.
        source: the file, whose name may be that of a published one, or the name of published weights.

    Returns:
        the constants; None where nothing says them.
    """
    return _stated_position(content, format_) or _published_position(format_, source) or _USUAL.get(format_)


def _stated_position(content: Mapping, format_: str) -> Position | None:
    """The constants in the options that a program stores with its weights."""
    if format_ == "mmdetection":
        temperature, offset = position_of(content) or (None, None)
        return _as_position([temperature] * 2, offset)
    options = content.get("args") if format_ == "official" else None
    return _as_position([getattr(options, f"pe_temperature{axis}", None) for axis in "HW"], 0.0)


def _published_position(format_: str, source: str | Path) -> Position | None:
    """That of a published file, known by its name."""
    entry = find_source(source)
    return Position((entry.temperature,) * 2, entry.offset) if entry and entry.format == format_ else None


def _as_position(temperatures: Any, offset: Any) -> Position | None:
    """None unless these are numbers that make sense."""
    found, step = _numbers(temperatures, 2, positive=True), _numbers([offset], 1)
    return Position(found, step[0]) if found and step else None


def _numbers(values: Any, count: int, positive: bool = False) -> tuple[float, ...] | None:
    """`count` numbers of moderate size as a tuple; None for anything else."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    fits = all(type(x) in (int, float) and abs(x) < _MOST and (x > 0 or not positive) for x in values)
    return tuple(map(float, values)) if fits else None
