"""Reading `.pkl` weight files without running code that they contain."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from dino.utils.files import DataError

from .content_check import check_content
from .pickle_check import BoundedFile, PickleCheck
from .stand_ins import STAND_INS


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and numpy arrays, and refuses every class or function off the list."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a class."""
        full = f"{module}.{name}"
        if full not in STAND_INS:
            raise DataError(f"the file contains {full[:100]}, which is not plain data")
        return STAND_INS[full]


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read the dict in a pickle file (Detectron2's `.pkl` weights).

    Settings and states of trainers that are known to be harmless become `Skipped`, see `stand_ins`.

    Raises:
        DataError: the file is missing or broken, is no dict, or holds more than plain data and numpy arrays.
    """
    try:
        with BoundedFile(path, max(1, os.path.getsize(path))) as file:
            PickleCheck(STAND_INS).run(file)
            file.seek(0)
            content = _PlainUnpickler(file, encoding="latin1").load()
        check_content(content, os.path.getsize(path))
    except FileNotFoundError:
        raise DataError(f"weights not found: {path}") from None
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"can't read the weights {path}: {str(error)[:300] or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise DataError(f"can't use the weights {path}: a dict was expected, not {type(content).__name__}")
    return content
