"""YOLO folders: a text file for each image, a line for each object, in fractions of the image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dino.data.file_names import match_names
from dino.data.images import IMAGE_SUFFIXES
from dino.utils.files import DataError, counted

from .source import FRACTIONS, Source, SourceImage, SourceObject, around, number, split_of, walk

_SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_NAMES = ("classes.txt", "obj.names", "labels/classes.txt")  # beside the images, where there is no data.yaml


def read_yolo(path: Path) -> dict[str, Source]:
    """Read a YOLO folder, or its data.yaml -> the data sets "train", "val" and "test" that exist.

    Lines are boxes (class, centre, size; where data.yaml has kpt_shape, also the key points of a pose) or outlines
    (class, points), as of segmentation and rotated boxes. Images without a text have no objects.

    Raises:
        DataError: no classes are named, a folder is missing, a line is broken, or no image has a text.
    """
    settings = _settings(path)
    root = path if path.is_dir() else path.parent
    names = _class_names(settings, root)
    key_points = _count_key_points(settings, root)
    splits, absent = _find_splits(settings, root)
    sources = {split: _read_split(folder, files, names, key_points) for split, (folder, files) in splits.items()}
    first = next(iter(sources))
    return sources | {first: sources[first]._replace(notes=(*absent, *sources[first].notes))}


def _find_splits(settings: dict, root: Path) -> tuple[dict[str, tuple[Path, list[Path]]], list[str]]:
    """Image folder and images of each split, and a note for each that is absent."""
    parts, absent = {}, []
    for key, split in _SPLITS.items():
        if settings.get(key):
            part = _find_split(root, settings[key])
            parts |= {split: part} if part else {}
            absent += [] if part else [f"{root}: {settings[key]!r}, the {split} split of data.yaml, is not in it"]
    if absent and "train" not in parts:
        raise DataError(f"{absent[0]}. Correct its paths: they are relative to data.yaml")
    return parts or _splits_of_folders(root), absent


def _settings(path: Path) -> dict:
    """The content of data.yaml; empty without one."""
    files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
    if not files:
        return {}
    if files[0].stat().st_size > 1_000_000:
        raise DataError(f"{files[0]}: too large for the description of a data set")
    try:
        text = files[0].read_text(encoding="utf-8-sig")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise DataError(f"{files[0]}: aliases (*name) are not read")
        content = yaml.safe_load(text)
    except DataError:
        raise
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
    if isinstance(names, dict) and {str(key) for key in names} == set(map(str, range(len(names)))):
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
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


def _count_key_points(settings: dict, root: Path) -> int:
    """How many numbers of a pose follow each box."""
    shape = settings.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1000 for n in shape):
        raise DataError(f"{root}: kpt_shape of data.yaml must be two positive whole numbers")
    return shape[0] * shape[1]


def _find_split(root: Path, stated: Any) -> tuple[Path, list[Path]] | None:
    """Image folder and images of a split: of a folder, or of a text that lists them; None if it is absent."""
    if not isinstance(stated, str):
        raise DataError(f"{root}: train, val and test must name one folder each, not {str(stated)[:60]!r}")
    place = _find(root, stated)
    if place is None:
        return None
    if place.is_dir():
        return place, walk(place, IMAGE_SUFFIXES)
    return root, _list_images(place, root)


def _list_images(text: Path, root: Path) -> list[Path]:
    """The images that a text lists."""
    lines = [line.strip() for line in _text(text).splitlines() if line.strip()]
    matched = match_names([{"file_name": line} for line in lines], root)
    found = [root / matched.get(index, _inside(line)) for index, line in enumerate(lines)]
    missing = next((line for line, file in zip(lines, found, strict=True) if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{text}: no image {missing!r} in {root}")
    return list(dict.fromkeys(found))


def _inside(stated: str) -> PurePosixPath:
    """A path without what leads out of the folder."""
    parts = PurePosixPath(stated.replace("\\", "/")).parts
    return PurePosixPath(*(part for part in parts if part not in ("..", ".", "/") and ":" not in part))


def _find(root: Path, stated: str) -> Path | None:
    """A folder or text inside `root`; tools state it relative to other folders, too.

    Two names of a folder must agree: `valid/images` is not `images`.
    """
    parts = _inside(stated).parts
    for start in range(len(parts)):
        place = root.joinpath(*parts[start:])
        if place.is_file() or (place.is_dir() and len(parts) - start >= min(len(parts), 2)):
            return place
    return None


def _splits_of_folders(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Without a data.yaml: folders such as `valid` or `images/val` are splits."""
    splits: dict[str, list[Path]] = {}
    for file in walk(root, IMAGE_SUFFIXES):
        splits.setdefault(split_of(*file.relative_to(root).parts[:-1]), []).append(file)
    order = sorted(splits, key=list(_SPLITS).index)
    folder = root / "images" if list(splits) == ["train"] and _all_in(splits["train"], root / "images") else root
    return {split: (folder, splits[split]) for split in order} or {"train": (root, [])}


def _all_in(files: list[Path], folder: Path) -> bool:
    return all(file.is_relative_to(folder) for file in files)


def _read_split(folder: Path, files: list[Path], names: list[str], key_points: int) -> Source:
    """The images of a split, with their objects."""
    if not files:
        raise DataError(f"{folder}: no images")
    images, empty = [], 0
    for file in files:
        labels = _label_file(file)
        empty += labels is None
        objects = list(_read_lines(labels, names, key_points)) if labels else []
        images.append(SourceImage(file.relative_to(folder).as_posix(), str(labels or file), objects))
    if empty == len(files):
        raise DataError(f"{folder}: {counted(empty, 'image')}, but no text with objects, in `labels` or beside them")
    notes = (f"{folder}: {counted(empty, 'image')} without a text, kept without objects",) if empty else ()
    return Source(folder, names, images, notes)


def _label_file(file: Path) -> Path | None:
    """The text of an image: in the folder `labels` that corresponds to `images`, or beside the image."""
    parts = list(file.parts[:-1])
    places = [file.with_suffix(".txt")]
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        places.insert(0, Path(*parts, file.name).with_suffix(".txt"))
    return next((place for place in places if place.is_file()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no text: {error}") from error


def _read_lines(labels: Path, names: list[str], key_points: int) -> Iterator[SourceObject]:
    """The objects of a text."""
    for line_number, line in enumerate(_text(labels).splitlines(), 1):
        where, words = f"{labels}, line {line_number}", line.split()
        if not words:
            continue
        label, *values = (number(word, where) for word in words)
        if not label.is_integer() or not 0 <= label < len(names):
            raise DataError(f"{where}: class {words[0]}, but there are {len(names)}, from 0 on")
        yield SourceObject(where, names[int(label)], _to_box(values, key_points, where), FRACTIONS)


def _to_box(values: list[float], key_points: int, where: str) -> list[float]:
    """The numbers after a class -> xywh in fractions."""
    if len(values) in (4, 4 + key_points):
        x, y, w, h = values[:4]
        return [x - w / 2, y - h / 2, w, h]
    if len(values) < 6 or len(values) % 2:
        raise DataError(f"{where}: a class and 4 numbers, or the points of an outline, not {len(values)} numbers")
    return around(list(zip(values[::2], values[1::2], strict=True)), where)
