"""Recipes by name: those of the source tree, or their copies in an installed package."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from .paths import WEIGHTS, PathError, expand, hint
from .printable import printable

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("configs", "projects/dino/configs", "projects/dino/configs/ablation")
_PARTS = ("__init__", "base")  # files that recipes share, which are no recipes
_USUAL = ("dino_r18_small_data", "dino_r50_4scale_12ep")
_MOST_YAML = 1 << 20  # characters that are looked at


def _recipe_root() -> Path:
    """The folder that holds FOLDERS: beside the package in a source tree, inside the package after an installation."""
    return _PACKAGE.parent if (_PACKAGE.parent / "setup.py").is_file() else _PACKAGE / "recipe_files"


def recipes() -> dict[str, Path]:
    """The file of each recipe that comes with the package, by its name without `.py`."""
    files = [path for folder in _FOLDERS for path in sorted((_recipe_root() / folder).glob("*.py"))]
    return {path.stem: path for path in files if path.stem not in _PARTS}


def find_recipe(name: str) -> Path:
    """Find a recipe's file by its path, its name, or the folder of a run that has used it.

    Raises:
        PathError: there is no such recipe, or the file is of another kind; the message names the nearest.
    """
    if not name:
        raise PathError("recipe not found: '': name one, such as dino_r18_small_data")
    path, known = Path(expand(name)), recipes()
    stem = name.removesuffix(".py")
    if os.path.isfile(path):
        return _check_kind(path)
    if stem in known:
        return known[stem]
    if os.path.isdir(path):
        return _recipe_of_run(path)
    near = difflib.get_close_matches(Path(stem).name.lower().replace("-", "_"), known, n=1)
    there = hint(path, {".py", ".yaml"}) if path.suffix or len(path.parts) > 1 else ""
    usual = there or (
        f"; the nearest is {near[0]}" if near else f": give a file or a name, such as {', '.join(_USUAL)}"
    )
    raise PathError(f"recipe not found: {printable(name, 200)!r}{usual}")


def _recipe_of_run(folder: Path) -> Path:
    """The config.yaml of a run.

    Raises:
        PathError: there is none.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise PathError(f"{printable(folder, 200)} is a folder without the config.yaml of a run: name a recipe")
    return path


def _check_kind(path: Path) -> Path:
    """The path of a recipe.

    Raises:
        PathError: its name, or the keys of a YAML file, say that it is something else.
    """
    shown, suffix = printable(path, 200), path.suffix.lower()
    if suffix == ".json":
        raise PathError(f"{shown} is no recipe: write dino train RECIPE --train {shown} IMAGES")
    if suffix in WEIGHTS:
        raise PathError(f"{shown} is a checkpoint, no recipe: write dino train RECIPE --weights {shown}")
    if suffix not in (".py", ".yaml", ".yml"):
        raise PathError(f"{shown} is no recipe, which ends in .py or .yaml: name one, such as {_USUAL[0]}")
    if suffix != ".py":
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_YAML)
        keys = re.findall(r"^([A-Za-z_]\w*):", text, re.M)
        if keys and "model" not in keys:
            raise PathError(f"{shown} is no recipe: it has the keys {', '.join(keys[:5])}, but no model{_origin(keys)}")
    return path


def _origin(keys: list[str]) -> str:
    """What a YAML file that is no recipe is, and what it is good for; "" where its keys do not tell."""
    if "MODEL" in keys:
        return ". It is of Detectron2's older system, yacs: see docs/quick_start.md"
    if {"names", "nc"} & set(keys):
        return ". It describes a YOLO data set: `dino data import` reads its folder"
    return ""
