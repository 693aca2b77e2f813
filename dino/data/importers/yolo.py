"""YOLO folders: a text file for each image, a line for each object, in fractions of the image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dino.data.images import IMAGE_SUFFIXES
from dino.utils.files import DataError

from .source import FRACTIONS, Source, SourceImage, SourceObject, around, number

_SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_NAMES = ("classes.txt", "obj.names")  # beside the images, where there is no data.yaml


def read_yolo(path: Path) -> dict[str, Source]:
    """Read a YOLO folder, or its data.yaml -> the data sets "train", "val" and "test" that exist.

    Lines are boxes (class, centre, size) or outlines (class, points), as of segmentation and rotated boxes.

    Raises:
        DataError: no classes are named, a folder is missing, or a line is broken.
    """
    settings = _settings(path)
    root = path if path.is_dir() else path.parent
    names = _class_names(settings, root)
    folders = {split: _find_folder(root, settings.get(key)) for key, split in _SPLITS.items() if settings.get(key)}
    if not folders:
        folders = {"train": root / "images" if (root / "images").is_dir() else root}
    return {split: Source(folder, names, list(_read_images(folder, names))) for split, folder in folders.items()}


def _settings(path: Path) -> dict:
    """The content of data.yaml; empty without one."""
    files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
    if not files:
        return {}
    if files[0].stat().st_size > 1_000_000:
        raise DataError(f"{files[0]}: too large for the description of a data set")
    try:
        content = yaml.safe_load(files[0].read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{files[0]}: no YAML: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise DataError(f"{files[0]}: the keys names, train and val are missing")
    return content


def _class_names(settings: dict, root: Path) -> list[str]:
    """Class names in the order of their numbers."""
    names: Any = settings.get("names")
    if names is None:
        names = _listed_names(root)
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[key] for key in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{root}: no list of class names, numbered from 0 on: names of data.yaml, or classes.txt")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        raise DataError(f"{root}: two classes have one name: {names}"[:300])
    return names


def _listed_names(root: Path) -> list[str]:
    """Class names of a text, one on each line; empty without one."""
    texts = [root / name for name in _NAMES if (root / name).is_file()]
    lines = texts[0].read_text(encoding="utf-8-sig").splitlines() if texts else []
    return [line.strip() for line in lines if line.strip()]


def _find_folder(root: Path, stated: Any) -> Path:
    """The folder of a split's images inside `root`; tools state it relative to other folders, too."""
    if not isinstance(stated, str):
        raise DataError(f"{root}: train, val and test must name one folder each, not {str(stated)[:60]!r}")
    parts = [part for part in PurePosixPath(stated.replace("\\", "/")).parts if part not in ("..", ".", "/")]
    for start in range(len(parts)):
        folder = root.joinpath(*parts[start:])
        if folder.is_dir():
            return folder
    raise DataError(f"{root}: the folder {stated!r} of data.yaml is not in it")


def _read_images(folder: Path, names: list[str]) -> Iterator[SourceImage]:
    """The images of a folder and its sub-folders, with their objects."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: no images")
    for file in files:
        labels = _label_file(folder, file)
        objects = list(_read_lines(labels, names)) if labels.is_file() else []
        yield SourceImage(file.relative_to(folder).as_posix(), str(labels), objects)


def _label_file(folder: Path, file: Path) -> Path:
    """The text of an image: in the folder `labels` that corresponds to `images`, or beside the image."""
    relative = file.relative_to(folder).with_suffix(".txt")
    parts = list(folder.parts)
    places = [i for i, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts) / relative


def _read_lines(labels: Path, names: list[str]) -> Iterator[SourceObject]:
    """The objects of a text."""
    try:
        lines = labels.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{labels}: no text: {error}") from error
    for line_number, line in enumerate(lines, 1):
        where, words = f"{labels}, line {line_number}", line.split()
        if not words:
            continue
        label, *values = (number(word, where) for word in words)
        if not label.is_integer() or not 0 <= label < len(names):
            raise DataError(f"{where}: class {words[0]}, but there are {len(names)}, from 0 on")
        if len(values) == 4:
            x, y, w, h = values
            box = [x - w / 2, y - h / 2, w, h]
        elif len(values) >= 6 and len(values) % 2 == 0:
            box = around(list(zip(values[::2], values[1::2], strict=True)), where)
        else:
            raise DataError(f"{where}: a class and 4 numbers, or the points of an outline, not {len(values)} numbers")
        yield SourceObject(where, names[int(label)], box, FRACTIONS)
