"""labelme, a JSON file for each image; Label Studio and CreateML, one for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino.data.coco import load_json
from dino.data.images import IMAGE_SUFFIXES
from dino.utils.files import DataError

from .source import FRACTIONS, Source, SourceImage, SourceObject, around, number

_LABELS = ("rectanglelabels", "polygonlabels")  # of Label Studio
_AROUND = ("rectangle", "polygon", "rotation", "mask")  # shapes of labelme whose box lies around their points


def read_labelme(path: Path, images: Path | None = None) -> Source:
    """Read a folder of labelme's files, or one of them.

    Raises:
        DataError: a file is broken or names no image.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    return Source(images or folder, [], [_read_labelme_file(file) for file in files])


def _read_labelme_file(path: Path) -> SourceImage:
    content = load_json(path, "annotations")
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"{path}: no file of labelme: the list shapes is missing")
    name = _text(content.get("imagePath"), f"{path}, imagePath")
    objects = []
    for index, shape in enumerate(content["shapes"], 1):
        where = f"{path}, shape {index}"
        kind, points = _get(shape, "shape_type", where), _get(shape, "points", where)
        if kind in (*_AROUND, None):
            objects.append(SourceObject(where, _text(_get(shape, "label", where), where), around(points, where)))
        elif kind == "circle":
            around(points, where)
            (x, y), (edge_x, edge_y) = points[:2]
            radius = math.hypot(edge_x - x, edge_y - y)
            box = [x - radius, y - radius, 2 * radius, 2 * radius]
            objects.append(SourceObject(where, _text(_get(shape, "label", where), where), box))
    return SourceImage(name, str(path), objects, len(content["shapes"]) - len(objects))


def read_label_studio(path: Path, images: Path | None = None) -> Source:
    """Read Label Studio's JSON: boxes, rotated ones too, and outlines, of the first annotation that nobody cancelled.

    Tasks without an annotation are left out: nobody said that their images have no objects.

    Raises:
        DataError: the file is broken, or a task has no image.
    """
    tasks = load_json(path, "annotations")
    if not isinstance(tasks, list):
        raise DataError(f"{path}: no list of tasks")
    beside = path.parent / "images"
    found = [_read_task(task, f"{path}, task {index}") for index, task in enumerate(tasks, 1)]
    done = [image for image in found if image is not None]
    folder = images or (beside if beside.is_dir() else path.parent)
    return Source(folder, [], done, unlabelled=len(found) - len(done))


def _read_task(task: Any, where: str) -> SourceImage | None:
    """An image and its objects; None if nobody has annotated it."""
    if not isinstance(task, dict):
        raise DataError(f"{where}: no JSON object")
    if "data" not in task:  # "JSON-MIN": the values of the labels, without their frame
        results = [{"type": _kind_of(value), "value": value, **value} for value in _list(task, "label", where)]
        data = task
    else:
        answers = [a for a in _list(task, "annotations", where) if not _get(a, "was_cancelled", where)]
        if not answers:
            return None
        results, data = _list(answers[0], "result", where), task["data"]
    objects = list(_read_answers(results, where))
    return SourceImage(_image_of(data, where), where, objects, len(results) - len(objects))


def _kind_of(value: Any) -> str | None:
    return next((kind for kind in _LABELS if isinstance(value, dict) and kind in value), None)


def _image_of(data: Any, where: str) -> str:
    """The name or address of a task's image."""
    for value in data.values() if isinstance(data, dict) else ():
        if isinstance(value, str) and (
            "?d=" in value or Path(value.partition("?")[0]).suffix.lower() in IMAGE_SUFFIXES
        ):
            return value
    raise DataError(f"{where}: its data names no image")


def _read_answers(results: list, where: str) -> Iterator[SourceObject]:
    """The boxes and outlines of an annotation; lengths are percent of the image."""
    for index, result in enumerate(results, 1):
        place = f"{where}, result {index}"
        kind = _get(result, "type", place)
        if kind not in _LABELS:
            continue
        value = _get(result, "value", place)
        labels = _list(value, kind, place)
        if not labels:
            raise DataError(f"{place}: it has no class")
        box = _percent_box(value, result, place) if kind == "rectanglelabels" else around(value.get("points"), place)
        yield SourceObject(place, _text(labels[0], place), [n / 100 for n in box], FRACTIONS)


def _percent_box(value: dict, result: dict, where: str) -> list[float]:
    """xywh in percent of a box; one that is rotated, about its first corner, gets the box around it."""
    x, y, w, h = (number(value.get(key), f"{where}, {key}") for key in ("x", "y", "width", "height"))
    angle = math.radians(number(value.get("rotation") or 0, f"{where}, rotation"))
    if angle == 0:
        return [x, y, w, h]
    across, down = (number(result.get(key), f"{where}, {key}") / 100 for key in ("original_width", "original_height"))
    if across <= 0 or down <= 0:
        raise DataError(f"{where}: original_width and original_height must be positive")
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(0, 0), (w * across, 0), (0, h * down), (w * across, h * down)]
    turned = [(x + (cos * a - sin * b) / across, y + (sin * a + cos * b) / down) for a, b in corners]
    return around(turned, where)


def read_create_ml(path: Path, images: Path | None = None) -> Source:
    """Read CreateML's JSON: boxes by their centre and size, in pixels.

    Raises:
        DataError: the file is broken.
    """
    entries = load_json(path, "annotations")
    if not isinstance(entries, list):
        raise DataError(f"{path}: no list of images")
    found = []
    for index, entry in enumerate(entries, 1):
        where = f"{path}, image {index}"
        name = _text(_get(entry, "image", where) or _get(entry, "imagefilename", where), where)
        objects = [
            _read_create_ml_object(annotation, f"{where}, annotation {n}")
            for n, annotation in enumerate(_list(entry, "annotations", where), 1)
        ]
        found.append(SourceImage(name, where, objects))
    return Source(images or path.parent, [], found)


def _read_create_ml_object(annotation: Any, where: str) -> SourceObject:
    place = _get(annotation, "coordinates", where)
    x, y, w, h = (number(_get(place, key, where), f"{where}, {key}") for key in ("x", "y", "width", "height"))
    return SourceObject(where, _text(_get(annotation, "label", where), where), [x - w / 2, y - h / 2, w, h])


def _get(entry: Any, key: str, where: str) -> Any:
    """A value of an entry, None where it is absent."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: no JSON object with the key {key!r}")
    return entry.get(key)


def _list(entry: Any, key: str, where: str) -> list:
    value = _get(entry, key, where)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: {key} is no list")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: a name was expected, not {str(value)[:40]!r}")
    return value.strip()
