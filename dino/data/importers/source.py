"""What every reader of another format returns, and its conversion to COCO's format."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino.data.file_names import match_names
from dino.data.images import image_size
from dino.utils.files import DataError, counted, resolve_inside

_LOWEST = -0.5  # fraction of the image: a box that leaves it by more is in another unit
_DIGITS = 6  # of a coordinate after the point: removes the noise of fractions
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
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
    """An image.

    Args:
        name: that the source gives it.
        where: the source names it, for messages.
        size: width and height in pixels that the source states, if its boxes are in pixels of them.
        left_out: number of shapes that have no box, such as points.
        others: more names that its file may have, if `name` matches none.
        split: "train", "val" or "test".
    """

    name: str
    where: str
    objects: list[SourceObject]
    left_out: int = 0
    size: tuple[int, int] | None = None
    others: tuple[str, ...] = ()
    split: str = "train"


class Source(NamedTuple):
    """A data set in another format.

    Args:
        folder: of the images.
        names: of the classes, in order; those that only objects have follow, sorted.
        images: all images, also those without objects.
        notes: lines about what is missing.
        unlabelled: number of images that nobody has annotated; they are not among the images.
    """

    folder: Path
    names: list[str]
    images: list[SourceImage]
    notes: tuple[str, ...] = ()
    unlabelled: int = 0


def split_of(*words: str) -> str:
    """The split that the first known word means, such as the folder "valid"; else "train"."""
    return next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), "train")


def by_split(source: Source) -> dict[str, Source]:
    """A data set for each split of the images, with the classes of all; the first one has the notes."""
    found = sorted({o.name for image in source.images for o in image.objects} - set(source.names))
    rest = source._replace(names=[*source.names, *found], notes=(), unlabelled=0)
    splits = {s: [image for image in source.images if image.split == s] for s in ("train", "val", "test")}
    parts = {split: rest._replace(images=images) for split, images in splits.items() if images}
    first = next(iter(parts), "train")
    whole = parts.get(first, rest)._replace(notes=source.notes, unlabelled=source.unlabelled)
    return parts | {first: whole}


def walk(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of a folder and its sub-folders by their endings, in small letters; hidden ones are left out."""
    found = []
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(directory, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in suffixes]
    return sorted(found)


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
        _check_size(image, file_name, (width, height))
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


def _check_size(image: SourceImage, file_name: str, size: tuple[int, int]) -> None:
    """Raise a DataError if boxes in pixels belong to an image of another size; turned by EXIF, it may be the same."""
    if image.size and sorted(image.size) != sorted(size):
        raise DataError(
            f"{image.where}: annotated at {image.size[0]}x{image.size[1]} pixels, but {file_name} has "
            f"{size[0]}x{size[1]}. Use the images that were annotated"
        )


def _file_names(source: Source) -> list[str]:
    """The file of each image, relative to the folder."""
    found = _find_files(source)
    files: dict[str, str] = {}
    for index, image in enumerate(source.images):
        if index not in found:
            missing = f"{len(source.images) - len(found):,} of {counted(len(source.images), 'image')}"
            raise DataError(
                f"{image.where}: no image {image.name!r} in {source.folder}, or several ({missing}). --images names "
                "another folder"
            )
        name = found[index]
        if name in files:
            raise DataError(f"{image.where}: {name} is listed already, in {files[name]}")
        files[name] = image.where
    return list(files)


def _find_files(source: Source) -> dict[int, str]:
    """Index of each image whose file is found, and its name relative to the folder."""
    found: dict[int, str] = {}
    choices = [[name.replace("\\", "/") for name in (image.name, *image.others)] for image in source.images]
    for rank in range(max(map(len, choices), default=0)):
        left = {i: names[rank] for i, names in enumerate(choices) if i not in found and rank < len(names)}
        matched = match_names([{"file_name": name} for name in left.values()], source.folder)
        for position, (index, name) in enumerate(left.items()):
            name = matched.get(position, name)
            if _is_file(source.folder, name):
                found[index] = Path(name).as_posix()
    return found


def _is_file(folder: Path, name: str) -> bool:
    try:
        return resolve_inside(folder, name).is_file()
    except (DataError, OSError, ValueError):  # it leaves the folder, or can be no name of a file
        return False


def _box_in_pixels(o: SourceObject, width: int, height: int) -> list[float]:
    """The box of an object, xywh in pixels."""
    if len(o.box) != 4 or not all(type(n) in (int, float) and math.isfinite(n) for n in o.box):
        raise DataError(f"{o.where}: a box must be four finite numbers, but is {list(o.box)!r}"[:300])
    x, y, w, h = o.box
    if o.unit == FRACTIONS and not (min(x, y) >= _LOWEST and max(x + w, y + h) <= 1 - _LOWEST):
        raise DataError(f"{o.where}: a box must be in fractions of the image, but reaches {max(x + w, y + h):.4g}")
    across, down = (width, height) if o.unit == FRACTIONS else (1, 1)
    return [round(n * by, _DIGITS) for n, by in zip(o.box, (across, down, across, down), strict=True)]


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


def around_ellipse(x: float, y: float, rx: float, ry: float, angle: float) -> list[float]:
    """The box xywh around an ellipse by its centre and half axes, turned by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    half_width, half_height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return [x - half_width, y - half_height, 2 * half_width, 2 * half_height]


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
