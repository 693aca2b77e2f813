"""labelme, a JSON file for each image; Label Studio and CreateML, one for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dino.data.coco import load_json
from dino.data.images import IMAGE_SUFFIXES
from dino.utils.files import DataError

from .recognition import recognise
from .source import (
    FRACTIONS,
    Source,
    SourceImage,
    SourceObject,
    around,
    around_ellipse,
    by_split,
    number,
    split_of,
    walk,
)

_AROUND = ("rectangle", "polygon", "rotation", "mask")  # shapes of labelme whose box lies around their points
_PLAIN = ("rectangle", "polygon", "ellipse")  # shapes of Label Studio whose class stands in another result
_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG")  # of images that a file names wrongly


def _files(path: Path, form: str) -> Iterator[tuple[Path, Path, Any]]:
    """A JSON file, or those of a format in a folder and its sub-folders: path, folder inside, content."""
    if path.is_file():
        yield path, Path(), load_json(path, "annotations")
        return
    for file in walk(path, {".json"}):
        content = load_json(file, "annotations")
        broken = form == "labelme" and isinstance(content, dict) and "shapes" in content
        if broken or recognise(file, content) == form:
            yield file, file.parent.relative_to(path), content


def read_labelme(path: Path, images: Path | None = None) -> dict[str, Source]:
    """Read a folder of labelme's files, with its sub-folders, or one of them -> its splits.

    Shapes with one label and one group are parts of one object. Images inside the files (imageData) are not read.

    Raises:
        DataError: a file is broken or names no image.
    """
    folder = path if path.is_dir() else path.parent
    found = [_read_labelme_file(file, inside, content) for file, inside, content in _files(path, "labelme")]
    return by_split(Source(images or folder, [], found))


def _read_labelme_file(path: Path, inside: Path, content: Any) -> SourceImage:
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"{path}: no file of labelme: the list shapes is missing")
    name = _text(content.get("imagePath"), f"{path}, imagePath").replace("\\", "/")
    objects: dict[Any, SourceObject] = {}
    without_box = 0
    for index, shape in enumerate(content["shapes"], 1):
        where = f"{path}, shape {index}"
        box = _labelme_box(_get(shape, "shape_type", where), _get(shape, "points", where), where)
        if box is None:
            without_box += 1
            continue
        label, group = _text(_get(shape, "label", where), where), shape.get("group_id")
        key = (label, group) if isinstance(group, int | str) else index
        if key in objects:
            box = _around_both(objects[key].box, box)
        objects[key] = SourceObject(where, label, box)
    others = (name, *((inside / path.stem).with_suffix(suffix).as_posix() for suffix in _SUFFIXES))
    beside = (inside / name).as_posix()
    split = split_of(*inside.parts)
    return SourceImage(beside, str(path), list(objects.values()), without_box, _stated(content), others, split)


def _stated(content: dict) -> tuple[int, int] | None:
    """The size that labelme states."""
    size = content.get("imageWidth"), content.get("imageHeight")
    return size if all(type(n) is int and n > 0 for n in size) else None


def _labelme_box(kind: Any, points: Any, where: str) -> list[float] | None:
    """The box xywh of a shape; None for lines and points."""
    if kind in (*_AROUND, None):
        box = around(points, where)
        last = 1 if kind == "mask" else 0  # whose points are its first and its last pixel
        return [*box[:2], box[2] + last, box[3] + last]
    if kind != "circle":
        return None
    around(points, where)
    (x, y), (edge_x, edge_y) = points[:2]
    radius = math.hypot(edge_x - x, edge_y - y)
    return [x - radius, y - radius, 2 * radius, 2 * radius]


def _around_both(one: Sequence[float], other: Sequence[float]) -> list[float]:
    corners = [(x, y) for a, b, w, h in (one, other) for x, y in ((a, b), (a + w, b + h))]
    return around(corners, "group")


def read_label_studio(path: Path, images: Path | None = None) -> dict[str, Source]:
    """Read Label Studio's JSON or JSON-MIN, a file or a folder: boxes, rotated ones too, ellipses and outlines.

    Of a task's annotations, the ground truth counts, else the first one that nobody cancelled. A task without any is
    left out: nobody looked at it. An annotation without objects keeps its image.

    Raises:
        DataError: the file is broken, or a task has no image.
    """
    folder = path if path.is_dir() else path.parent
    beside = folder / "images"
    found, unseen = [], 0
    for file, inside, tasks in _files(path, "label_studio"):
        if not isinstance(tasks, list):
            raise DataError(f"{file}: no list of tasks")
        for index, task in enumerate(tasks, 1):
            image = _read_task(task, f"{file}, task {index}", split_of(*inside.parts))
            found += [image] if image else []
            unseen += image is None
    return by_split(Source(images or (beside if beside.is_dir() else folder), [], found, unlabelled=unseen))


def _read_task(task: Any, where: str, split: str) -> SourceImage | None:
    """The image of a task, with its objects; None if nobody annotated it."""
    data = _get(task, "data", where)
    if data is None:  # JSON-MIN has all in one
        regions = [region for value in task.values() if isinstance(value, list) for region in value]
        results = [{"value": region, **region} for region in regions if isinstance(region, dict)]
        data = task
    else:
        answers = [a for a in _list(task, "annotations", where) if not _get(a, "was_cancelled", where)]
        if not answers:
            _image_of(data, where)
            return None
        chosen = max(answers, key=lambda answer: answer.get("ground_truth") is True)
        results = _list(chosen, "result", where)
    objects, without_box = _read_answers(results, where)
    return SourceImage(_image_of(data, where), where, objects, without_box, split=split)


def _image_of(data: Any, where: str) -> str:
    """The name or address of a task's image."""
    for value in data.values() if isinstance(data, dict) else ():
        if isinstance(value, str) and (
            "?d=" in value or Path(value.partition("?")[0]).suffix.lower() in IMAGE_SUFFIXES
        ):
            return value
    raise DataError(f"{where}: its data names no image")


def _read_answers(results: list, where: str) -> tuple[list[SourceObject], int]:
    """The boxes and outlines of an annotation, and how many results have none; lengths are percent of the image."""
    objects, named, left_out = [], set(), []
    for index, result in enumerate(results, 1):
        place = f"{where}, result {index}"
        value = _get(result, "value", place)
        box = _percents(value, result, place) if isinstance(value, dict) else None
        labels = _labels_of(value) if box else None
        if labels:
            named.add(str(result.get("id")))
            objects.append(SourceObject(place, _text(labels[0], place), [n / 100 for n in box], FRACTIONS))
        elif box and result.get("type") not in _PLAIN:
            raise DataError(f"{place}: it has no class")
        else:
            left_out.append(str(result.get("id")) if box else None)
    return objects, sum(name not in named for name in left_out)


def _labels_of(value: dict) -> list | None:
    """The classes of a region."""
    return next((v for key, v in value.items() if key.endswith("labels") and isinstance(v, list) and v), None)


def _percents(value: dict, result: dict, where: str) -> list[float] | None:
    """xywh in percent of a shape; None for what has no box."""
    if "points" in value:
        return around(value["points"], where)
    if "radiusX" in value:
        x, y, rx, ry = (number(value.get(key), f"{where}, {key}") for key in ("x", "y", "radiusX", "radiusY"))
        angle = math.radians(number(value.get("rotation") or 0, f"{where}, rotation"))
        if angle == 0:
            return around_ellipse(x, y, rx, ry, 0)
        across, down = _pixels_of_a_percent(result, where)
        box = around_ellipse(x * across, y * down, rx * across, ry * down, angle)
        return [box[0] / across, box[1] / down, box[2] / across, box[3] / down]
    return _percent_box(value, result, where) if "width" in value and "height" in value else None


def _pixels_of_a_percent(result: dict, where: str) -> tuple[float, float]:
    across, down = (number(result.get(key), f"{where}, {key}") / 100 for key in ("original_width", "original_height"))
    if across <= 0 or down <= 0:
        raise DataError(f"{where}: original_width and original_height must be positive")
    return across, down


def _percent_box(value: dict, result: dict, where: str) -> list[float]:
    """xywh in percent of a box; one that is rotated, about its first corner, gets the box around it."""
    x, y, w, h = (number(value.get(key), f"{where}, {key}") for key in ("x", "y", "width", "height"))
    angle = math.radians(number(value.get("rotation") or 0, f"{where}, rotation"))
    if angle == 0:
        return [x, y, w, h]
    across, down = _pixels_of_a_percent(result, where)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(0, 0), (w * across, 0), (0, h * down), (w * across, h * down)]
    turned = [(x + (cos * a - sin * b) / across, y + (sin * a + cos * b) / down) for a, b in corners]
    return around(turned, where)


def read_create_ml(path: Path, images: Path | None = None) -> dict[str, Source]:
    """Read CreateML's JSON, a file or those of a folder -> its splits: boxes by their centre and size, in pixels.

    Raises:
        DataError: a file is broken.
    """
    found = []
    for file, inside, entries in _files(path, "create_ml"):
        if not isinstance(entries, list):
            raise DataError(f"{file}: no list of images")
        for index, entry in enumerate(entries, 1):
            where = f"{file}, image {index}"
            name = _text(_get(entry, "image", where) or _get(entry, "imagefilename", where), where)
            objects = [
                _read_create_ml_object(annotation, f"{where}, annotation {n}")
                for n, annotation in enumerate(_list(entry, _key_of(entry), where), 1)
            ]
            beside = (inside / name).as_posix()
            found.append(SourceImage(beside, where, objects, others=(name,), split=split_of(*inside.parts)))
    return by_split(Source(images or (path if path.is_dir() else path.parent), [], found))


def _key_of(entry: dict) -> str:
    """Where an entry of CreateML has its objects."""
    return "annotation" if "annotation" in entry else "annotations"


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
