"""The values of a file's tensors: of a kind that the model can take, and finite."""

from __future__ import annotations

import torch
from torch import Tensor

from dino.utils.files import DataError

from .load_report import shorten
from .names import StateDict

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_layout(state: StateDict) -> None:
    """Raise a DataError where a tensor is no plain array of numbers: sparse, quantised, or without values."""
    for name, value in state.items():
        kind = "quantised" if value.is_quantized else "sparse" if value.layout is not torch.strided else ""
        if kind or value.is_meta:
            raise DataError(f"{name} is {kind or 'without values'}: plain tensors were expected")


def to_dtypes(chosen: StateDict, target: StateDict) -> StateDict:
    """Convert the chosen tensors to the model's types: floating point to floating point, integers to integers.

    Raises:
        DataError: a tensor is of another kind, or has NaN or infinite values; names the first ones.
    """
    wrong = [name for name, found in chosen.items() if not _is_kind(found, target[name])]
    if wrong:
        first = wrong[0]
        found, value = (str(state[first].dtype).removeprefix("torch.") for state in (chosen, target))
        raise DataError(
            f"{first} is {found} in the file and {value} in the model: {len(wrong)} tensors can't be loaded"
        )
    converted = {name: found.to(target[name].dtype) for name, found in chosen.items()}
    _check_finite(converted, target)
    return converted


def _is_kind(found: Tensor, value: Tensor) -> bool:
    """Whether a tensor of the file has the kind of number of the model's."""
    return found.dtype in (
        _FLOATS if value.is_floating_point() else _INTEGERS + _FLOATS
    )  # averages of counters are floats


def _check_finite(chosen: StateDict, target: StateDict) -> None:
    """Raise a DataError where a tensor has NaN or infinite values, unless the model's own has: masks may."""
    broken = [name for name, value in chosen.items() if not _is_finite(value) and _is_finite(target[name])]
    if broken:
        nan = [name for name in broken if chosen[name].isnan().any()]
        what = "NaN" if len(nan) == len(broken) else "NaN or infinite values" if nan else "infinite values"
        raise DataError(
            f"the file has {what} in {shorten(broken, 3)}: {len(broken)} tensors of {len(chosen)}. The training that "
            "wrote it had diverged: use an earlier checkpoint"
        )


def _is_finite(value: Tensor) -> bool:
    """Whether all values are finite. Their sum shows it without more memory; where it overflows, each is tested."""
    if not value.is_floating_point():
        return True
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())
