"""The weights of a file, whatever program wrote it: which copy, which format, under own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dino.utils.files import DataError

from .checkpoint_formats import convert
from .mmdetection import MMDETECTION_POSITION, classes_of, position_of
from .names import StateDict
from .other_detectors import name_detector
from .reading import average_of, weights_of
from .signatures import Copies, split_copies

_OFFICIAL_POSITION = (20.0, 0.0)  # temperature and offset of its position encoding, and of the port to transformers
_FLAT = "_flat_param"  # the end of the names of parameters that FSDP has joined


class FileWeights(NamedTuple):
    """The result of `read_weights`."""

    state: StateDict  # of a DINO, in own format; of anything else, with its own names and no prefixes
    format: str  # of the file: a key of `SIGNATURES`, or "backbone" for anything else than a DINO
    notes: list[str]  # sentences for people
    position: tuple[float, float] | None  # temperature and offset of the position encoding, where the format tells
    names: list[str] | None  # of the classes, where another program's file tells
    detector: str | None  # the name of another detector that the tensors are of


def read_weights(content: Mapping[str, Any], copy: str = "auto") -> FileWeights:
    """Find the weights in the content of a file, and convert those of a DINO to own format.

    Args:
        content: of `read_content`, or a state dict.
        copy: "model", "ema" (the running average), or "auto" for the running average if the file has one.

    Raises:
        DataError: there are none, `copy` is missing, or they are no whole tensors.
        ValueError: two names would become one.
    """
    stored, average = weights_of(content), average_of(content, copy)
    copies = split_copies(stored)
    _check_whole(copies)
    notes = _describe_copy(copies, average)
    if copies.format is None:
        state = _without_prefixes(copies) | (_without_prefixes(split_copies(average)) if average else {})
        return FileWeights(state, "backbone", notes, None, None, name_detector(stored))
    own = convert(stored)
    if average is not None:
        own |= convert(average)
    position, more = _find_position(content, copies.format)
    names = classes_of(content) if copies.format == "mmdetection" else None
    return FileWeights(own, copies.format, notes + more, position, names, None)


def _without_prefixes(copies: Copies) -> StateDict:
    return (copies.average if copies.raw is None else copies.raw) or {}


def _check_whole(copies: Copies) -> None:
    """Raise a DataError for parameters that FSDP has joined."""
    if flat := next((key for key in _without_prefixes(copies) if key.endswith(_FLAT)), None):
        raise DataError(
            f"the file has the joined parameters of FSDP ({flat}): save the model with StateDictType.FULL_STATE_DICT, "
            "or by torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )


def _describe_copy(copies: Copies, average: StateDict | None) -> list[str]:
    """Sentences on the copy of the weights and on their names in the file."""
    notes = []
    if average is not None:
        notes.append("loaded: the running average (EMA) of the weights")
    if copies.removed:
        notes.append(f"prefixes removed from the names of tensors: {', '.join(copies.removed)}")
    return notes


def _find_position(content: Mapping[str, Any], format_: str) -> tuple[tuple[float, float] | None, list[str]]:
    """Temperature and offset of the position encoding, and sentences on where they are from."""
    if format_ in ("official", "huggingface"):
        return _OFFICIAL_POSITION, []
    if format_ != "mmdetection":
        return None, []
    if found := position_of(content):
        return found, [
            f"the config in the file says: position encoding of temperature {found[0]:g}, offset {found[1]:g}"
        ]
    return MMDETECTION_POSITION, [
        "the file has no config: most DINOs of mmdetection have a position encoding of temperature 20 and offset 0, "
        "those of its configs called improved 10000 and -0.5"
    ]
