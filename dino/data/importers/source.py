"""What every reader of another format returns, and its conversion to COCO's format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino.data.file_names import match_names
from dino.data.images import image_size
from dino.utils.files import DataError, resolve_inside

_LOWEST = -0.5  # fraction of the image: a box that leaves it by more is in another unit
PIXELS, FRACTIONS = "pixels", "fractions"  # units of a box; fractions are of the image's width and height


class SourceObject(NamedTuple):
    """An object.

    Args:
        where: file and line or key, for messages.
        name: of its class.
        box: xywh in `unit`.
    """

    where: str
    name: str
    box: Sequence[float]
    unit: str = PIXELS


class SourceImage(NamedTuple):
    """An image: the name that the source gives it, where the source names it, and its objects.

    `left_out` counts the shapes that have no box, such as points.
    """

    name: str
    where: str
    objects: list[SourceObject]
    left_out: int = 0


class Source(NamedTuple):
    """A data set in another format.

    Args:
        folder: of the images.
        names: of the classes, in order; those that only objects have follow, sorted.
        images: all images, also those without objects.
        unlabelled: number of images that nobody has annotated; they are not among the images.
    """

    folder: Path
    names: list[str]
    images: list[SourceImage]
    unlabelled: int = 0


def to_coco(source: Source) -> dict[str, Any]:
    """Convert to COCO's format, with sizes from the image files.

    Raises:
        DataError: an image is missing or listed twice; a box is not four finite numbers.
    """
    known = dict.fromkeys(source.names)
    found = {o.name for image in source.images for o in image.objects}
    names = [*known, *sorted(found - set(known))]
    if not names:
        raise DataError(f"{source.folder}: there are neither classes nor objects")
    ids = {name: number for number, name in enumerate(names, 1)}
    images, annotations = [], []
    for image, file_name in zip(source.images, _file_names(source), strict=True):
        width, height = image_size(resolve_inside(source.folder, file_name))
        images.append({"id": len(images) + 1, "file_name": file_name, "width": width, "height": height})
        for o in image.objects:
            box = _box_in_pixels(o, width, height)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": ids[o.name],
                    "bbox": box,
                    "area": max(box[2], 0) * max(box[3], 0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _file_names(source: Source) -> list[str]:
    """The file of each image, relative to the folder."""
    names = [image.name.replace("\\", "/") for image in source.images]
    matched = match_names([{"file_name": name} for name in names], source.folder)
    files: dict[str, str] = {}
    for index, image in enumerate(source.images):
        name = matched.get(index, names[index])
        try:
            exists = resolve_inside(source.folder, name).is_file()
        except (DataError, OSError, ValueError):
            exists = False
        if not exists:
            raise DataError(f"{image.where}: no image {image.name!r} in {source.folder}. --images names another folder")
        if name in files:
            raise DataError(f"{image.where}: {name} is listed already, in {files[name]}")
        files[name] = image.where
    return list(files)


def _box_in_pixels(o: SourceObject, width: int, height: int) -> list[float]:
    """The box of an object, xywh in pixels."""
    if len(o.box) != 4 or not all(type(n) in (int, float) and math.isfinite(n) for n in o.box):
        raise DataError(f"{o.where}: a box must be four finite numbers, but is {list(o.box)!r}"[:300])
    x, y, w, h = o.box
    if o.unit == FRACTIONS and not (min(x, y) >= _LOWEST and max(x + w, y + h) <= 1 - _LOWEST):
        raise DataError(f"{o.where}: a box must be in fractions of the image, but reaches {max(x + w, y + h):.4g}")
    return [x * width, y * height, w * width, h * height] if o.unit == FRACTIONS else [x, y, w, h]


def around(points: Sequence[Sequence[float]], where: str) -> list[float]:
    """The box xywh around points (x, y).

    Raises:
        DataError: they are not at least two pairs of finite numbers.
    """
    sound = isinstance(points, Sequence) and len(points) > 1 and all(map(_is_point, points))
    if not sound:
        raise DataError(f"{where}: an outline must be a list of points (x, y), finite numbers")
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _is_point(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 2
    return numbers and all(type(n) in (int, float) and math.isfinite(n) for n in value)


def number(text: Any, where: str) -> float:
    """A finite number from a text.

    Raises:
        DataError: it is none.
    """
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: a finite number was expected, not {str(text)[:40]!r}")
    return value
