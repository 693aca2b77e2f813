"""Warnings of libraries, which a user of the console can do nothing about, are not shown; those of this project are."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from .printable import printable

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_OF_IMPORTS = "ignore::FutureWarning:torch.jit._script,ignore:pkg_resources is deprecated"


def is_own(file: str) -> bool:
    """Whether a warning that names this file is of the project."""
    return file.startswith(_PACKAGE)


def hide_library_warnings() -> None:
    """Show this project's warnings in one line, and no others; `python -W` and PYTHONWARNINGS show all as usual."""
    if not sys.warnoptions:
        warnings.showwarning = _show


@contextlib.contextmanager
def quiet_children() -> Iterator[None]:
    """Within the block, new processes hide what Detectron2's import warns of, before any code of ours runs there."""
    if os.environ.get("PYTHONWARNINGS"):
        yield
        return
    os.environ["PYTHONWARNINGS"] = _OF_IMPORTS
    try:
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]


def _show(message: Warning | str, category: type[Warning], filename: str, *_) -> None:
    if is_own(filename) and sys.stderr is not None:
        print(f"warning: {printable(message, None)}", file=sys.stderr)
