"""Checking the content of a weight file: its tensors are dense, and claim no more numbers than the file has."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.utils.files import DataError

from .stand_ins import Skipped

MOST_INFLATED = 4  # times the file's size: weights hardly compress, and PyTorch stores them as they are
_MOST_SHARED, _SLACK = 16, 2**26  # times the file's size, and bytes: numbers that several tensors share
_NAME = 200  # characters of a name in a message


def check_content(content: Any, size: int) -> None:
    """Check the tensors in the content of a file, and that nothing in it hides the methods of a dict or a tensor.

    Args:
        content: nested dicts, lists and tuples with tensors and arrays.
        size: of the file in bytes.

    Raises:
        DataError: a tensor is not dense or not real, or they claim more numbers than the file has.
    """
    waiting, seen, storages, claimed = [("", content)], set(), {}, 0
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            vars(value).clear()
            storage = _check_tensor(name, value)
            storages[storage.data_ptr()] = storage.nbytes()
            claimed += value.nbytes
        elif isinstance(value, np.ndarray):
            claimed += value.nbytes
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += _children(name, value)
    if sum(storages.values()) > MOST_INFLATED * size or claimed > _MOST_SHARED * size + _SLACK:
        raise DataError(f"the file of {size:,} bytes claims tensors of {claimed:,} bytes")


def _children(name: str, value: Any) -> list[tuple[str, Any]]:
    """The values in a container, with their names; none for anything else."""
    if isinstance(value, OrderedDict | Counter):
        vars(value).clear()
    if not isinstance(value, dict) and hasattr(value, "__dict__"):  # an argparse.Namespace
        value = vars(value)
    if isinstance(value, dict):
        _check_placeholders(value)
        return [(f"{name}.{_end(key)}"[-_NAME:].removeprefix("."), child) for key, child in value.items()]
    return [(name, child) for child in value] if isinstance(value, list | tuple) else []


def _check_placeholders(state: dict) -> None:
    """Raise a DataError where a dict of tensors has a `Skipped` under the name of a weight, which has a dot."""
    skipped = [key for key, child in state.items() if isinstance(child, Skipped) and "." in str(key)]
    if skipped and any(isinstance(child, Tensor) for child in state.values()):
        raise DataError(f"{_end(skipped[0])!r} is an object of another program where weights were expected")


def _end(key: Any) -> str:
    """The end of a key, which can have any length."""
    return str(key)[-_NAME:]


def _check_tensor(name: str, value: Tensor) -> torch.UntypedStorage:
    """Check one tensor, and return where its numbers are.

    Raises:
        DataError: it is not dense, or has fewer numbers than its shape.
    """
    kinds = {
        "sparse": value.layout != torch.strided,
        "quantised": value.is_quantized,
        "nested": value.is_nested,
        "complex": value.is_complex(),
        "without numbers (of the meta device)": value.device.type != "cpu",
    }
    odd = next((kind for kind, found in kinds.items() if found), None)
    if odd:
        raise DataError(f"the tensor {name} is {odd}: save it as a dense one of real numbers")
    storage = value.untyped_storage()
    if value.nbytes > storage.nbytes():
        raise DataError(
            f"the tensor {name} is expanded: of shape {tuple(value.shape)}, but with only "
            f"{storage.nbytes() // value.itemsize:,} numbers. Save its clone()"
        )
    return storage
