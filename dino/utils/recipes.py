"""Recipes by name: those of the source tree, or their copies in an installed package."""

from __future__ import annotations

import difflib
from pathlib import Path

from .files import UserError

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("configs", "projects/dino/configs", "projects/dino/configs/ablation")
_PARTS = ("__init__", "base")  # files that recipes share, which are no recipes


def _recipe_root() -> Path:
    """The folder that holds FOLDERS: beside the package in a source tree, inside the package after an installation."""
    return _PACKAGE.parent if (_PACKAGE.parent / "setup.py").is_file() else _PACKAGE / "recipe_files"


def recipes() -> dict[str, Path]:
    """The file of each recipe that comes with the package, by its name without `.py`."""
    files = [path for folder in _FOLDERS for path in sorted((_recipe_root() / folder).glob("*.py"))]
    return {path.stem: path for path in files if path.stem not in _PARTS}


def find_recipe(name: str) -> Path:
    """Find a recipe's file by its path or its name.

    Raises:
        UserError: there is no such recipe. The message lists all names, the most similar first.
    """
    if name and Path(name).is_file():
        return Path(name)
    known = recipes()
    stem = name.removesuffix(".py")
    if stem in known:
        return known[stem]
    near = difflib.get_close_matches(Path(stem).name, known, n=1)
    names = ", ".join([*near, *(other for other in known if other not in near)])
    raise UserError(f"recipe not found: {name!r}. Give --config-file a path or one of these names: {names}")
