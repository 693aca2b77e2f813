"""The weights of a file, whatever program wrote it: which copy, which format, under own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dino.utils.files import DataError

from .checkpoint_formats import convert
from .mmdetection import position_of
from .names import StateDict
from .reading import average_of, weights_of
from .signatures import Copies, split_copies
from .values import check_layout

_FLAT = "_flat_param"  # the end of the names of parameters that FSDP has joined


class FileWeights(NamedTuple):
    """The result of `read_weights`."""

    state: StateDict  # of a DINO, in own format; of anything else, with its own names and no prefixes
    format: str  # of the file: a key of `SIGNATURES`, or "backbone" for anything else than a DINO
    notes: list[str]  # sentences for people


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
    check_layout(stored | (average or {}))
    copies = split_copies(stored)
    _check_whole(copies)
    notes = _describe_copy(copies, average)
    if copies.format is None:
        state = _without_prefixes(copies) | (_without_prefixes(split_copies(average)) if average else {})
        return FileWeights(state, "backbone", notes)
    own = convert(stored)
    if average is not None:
        own |= convert(average)
    return FileWeights(own, copies.format, notes + _describe_position(content, copies.format))


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


def _describe_position(content: Mapping[str, Any], format_: str) -> list[str]:
    """A sentence on what a file of mmdetection says of its position encoding."""
    if format_ != "mmdetection":
        return []
    if found := position_of(content):
        return [f"the config in the file says: position encoding of temperature {found[0]:g}, offset {found[1]:g}"]
    return [
        "the file has no config: most DINOs of mmdetection have a position encoding of temperature 20 and offset 0, "
        "those of its configs called improved 10000 and -0.5"
    ]
