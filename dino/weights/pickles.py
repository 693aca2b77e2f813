"""Reading `.pkl` weight files without running code that they contain."""

from __future__ import annotations

import codecs
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dino.utils.files import DataError

_ALLOWED = {
    ("_codecs", "encode"): codecs.encode,  # bytes in protocols before 3
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{
        (f"numpy.{core}.{module}", name): getattr(getattr(np._core, module), name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and numpy arrays, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that numpy arrays need."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the file contains {module}.{name}, which is not plain data")
        return _ALLOWED[module, name]


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read the dict in a pickle file (Detectron2's `.pkl` weights).

    Raises:
        DataError: the file is missing or broken, is no dict, or holds more than plain data and numpy arrays.
    """
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"weights not found: {path}") from None
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"can't read the weights {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"can't use the weights {path}: a dict was expected, not {type(content).__name__}")
    return content
