"""Pascal VOC, a file for each image, and "CVAT for images", one file for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from dino.utils.files import DataError

from .source import (
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

_LARGEST = 500_000_000  # bytes
_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG")  # of images that a file names wrongly
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_CVAT_CORNERS = ("xtl", "ytl", "xbr", "ybr")


def parse_xml(path: Path) -> Element:
    """The root of an XML file without entities of its own.

    Raises:
        DataError: it is broken, too large, or declares entities.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path}: larger than {_LARGEST:,} bytes")
        content = path.read_bytes()
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content[:100]:
            raise DataError(f"{path}: XML with a document type, or not in UTF-8, is not read")
        return ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no XML: {error}") from error


def read_voc(folder: Path, images: Path | None = None) -> dict[str, Source]:
    """Read a folder of Pascal VOC files, with its sub-folders -> its splits.

    Folders such as `valid`, or texts in ImageSets/Main, are splits. Corners are used as they are written, as labelImg
    means them. Only where the file says that it is of the original data set, pixels count from 1 on.

    Args:
        folder: of the XML files, or one that has them in `Annotations`.
        images: folder of the images; None for `JPEGImages` beside them, or the same folder.

    Raises:
        DataError: a file is broken or names no image.
    """
    files = walk(folder, {".xml"})
    if not files:
        raise DataError(f"{folder}: no XML files")
    root = folder.parent if folder.name == "Annotations" else folder
    beside = root / "JPEGImages"
    place = images or (beside if beside.is_dir() else folder)
    sets = _read_sets(root)
    found = [_read_voc_file(file, folder, place, sets) for file in files]
    return by_split(Source(place, [], found))


def _read_sets(root: Path) -> dict[str, str]:
    """Split of each image, by its name without ending, from the texts of Pascal VOC."""
    texts = {split: root / "ImageSets/Main" / f"{split}.txt" for split in ("train", "val", "test")}
    return {
        line.split()[0]: split
        for split, path in texts.items()
        if path.is_file()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.split()
    }


def _read_voc_file(path: Path, folder: Path, images: Path, sets: dict[str, str]) -> SourceImage:
    """One image and its objects."""
    root = parse_xml(path)
    name = root.findtext("filename")
    if root.tag != "annotation" or not name:
        raise DataError(f"{path}: no Pascal VOC file: <annotation> with a <filename>")
    first = 1 if "VOC" in (root.findtext("source/database") or "") else 0  # number of the first pixel
    objects = []
    for index, entry in enumerate(root.iter("object"), 1):
        where = f"{path}, object {index}"
        x0, y0, x1, y1 = (number(entry.findtext(f"bndbox/{key}"), f"{where}, {key}") for key in _CORNERS)
        box = [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]
        objects.append(SourceObject(where, _named(entry.findtext("name"), where), box))
    inside = path.relative_to(folder)
    split = sets.get(path.stem) or split_of(*inside.parts[:-1])
    first_name, *others = _names_of(name, inside, images)
    return SourceImage(first_name, str(path), objects, 0, _size_of(root.find("size"), path), tuple(others), split)


def _names_of(name: str, inside: Path, images: Path) -> Iterator[str]:
    """Names that an image may have: beside its file, as the file says, as the file is called."""
    if (images / inside.parent).is_dir():
        yield (inside.parent / PureWindowsPath(name).name).as_posix()
    yield name
    if ".." not in name:
        yield from (inside.with_suffix(suffix).as_posix() for suffix in _SUFFIXES)


def _size_of(entry: Element | None, path: Path) -> tuple[int, int] | None:
    """Width and height in pixels, if they are stated."""
    if entry is None:
        return None
    width, height = (number(entry.findtext(key) or 0, f"{path}, {key}") for key in ("width", "height"))
    return (int(width), int(height)) if min(width, height) > 0 else None


def _named(name: str | None, where: str) -> str:
    """The name of a class."""
    if not name or not name.strip():
        raise DataError(f"{where}: it has no class")
    return name.strip()


def read_cvat(path: Path, images: Path | None = None) -> dict[str, Source]:
    """Read "CVAT for images 1.1" -> its splits: boxes, rotated ones too, outlines, ellipses and masks.

    Args:
        path: annotations.xml, or a folder with such files, as of a project's tasks; its subsets are splits.
        images: folder of the images; None for `images` beside the file, or its folder.

    Raises:
        DataError: a file is broken, or of a video.
    """
    files = [path] if path.is_file() else walk(path, {".xml"})
    folder = path.parent if path.is_file() else path
    names: dict[str, None] = {}
    found: list[SourceImage] = []
    for file in files:
        root = _parse_cvat(file)
        labels = (label for label in root.iterfind("meta/*/labels/label") if label.find("parent") is None)
        names |= dict.fromkeys(filter(None, (label.findtext("name") for label in labels)))
        inside = file.parent.relative_to(folder)
        found += [_read_cvat_image(file, image, inside) for image in root.iterfind("image")]
    return by_split(Source(images or _images_of(files, folder), list(names), found))


def _parse_cvat(path: Path) -> Element:
    """The root of a file."""
    root = parse_xml(path)
    if root.tag != "annotations" or root.find("image") is None:
        video = " of a video: export it as COCO, or as CVAT for images" if root.find("track") is not None else ""
        raise DataError(f"{path}: no annotations of images{video}")
    return root


def _images_of(files: list[Path], folder: Path) -> Path:
    """The folder of the images."""
    alone = len(files) == 1 and files[0].parent == folder and (folder / "images").is_dir()
    return folder / "images" if alone else folder


def _read_cvat_image(path: Path, image: Element, inside: Path) -> SourceImage:
    """An image and its objects; points and lines have no box."""
    name = image.get("name", "")
    where = f"{path}, image {name!r}"
    objects = []
    for index, shape in enumerate(image, 1):
        place = f"{where}, shape {index}"
        if shape.tag in _CVAT_SHAPES:
            objects.append(
                SourceObject(place, _named(shape.get("label"), place), _CVAT_SHAPES[shape.tag](shape, place))
            )
    others = tuple((inside / folder / name).as_posix() for folder in ("images", "."))
    width, height = (number(image.get(key, 0), f"{where}, {key}") for key in ("width", "height"))
    size = (int(width), int(height)) if min(width, height) > 0 else None
    split = split_of(image.get("subset") or "", *inside.parts)
    names = (name, *others) if inside == Path() else (*others, name)
    return SourceImage(names[0], where, objects, len(image) - len(objects), size, names[1:], split)


def _from_box(shape: Element, where: str) -> list[float]:
    x0, y0, x1, y1 = (number(shape.get(key), f"{where}, {key}") for key in _CVAT_CORNERS)
    angle = math.radians(number(shape.get("rotation", "0"), f"{where}, rotation"))
    if angle == 0:
        return [x0, y0, x1 - x0, y1 - y0]
    width = abs((x1 - x0) * math.cos(angle)) + abs((y1 - y0) * math.sin(angle))
    height = abs((x1 - x0) * math.sin(angle)) + abs((y1 - y0) * math.cos(angle))
    return [(x0 + x1 - width) / 2, (y0 + y1 - height) / 2, width, height]


def _from_outline(shape: Element, where: str) -> list[float]:
    pairs = [point.split(",") for point in shape.get("points", "").split(";")]
    return around([tuple(number(n, where) for n in pair) for pair in pairs], where)


def _from_ellipse(shape: Element, where: str) -> list[float]:
    x, y, rx, ry = (number(shape.get(key), f"{where}, {key}") for key in ("cx", "cy", "rx", "ry"))
    angle = math.radians(number(shape.get("rotation", "0"), f"{where}, rotation"))
    return around_ellipse(x, y, rx, ry, angle)


def _from_mask(shape: Element, where: str) -> list[float]:
    return [number(shape.get(key), f"{where}, {key}") for key in ("left", "top", "width", "height")]


_CVAT_SHAPES = {"box": _from_box, "polygon": _from_outline, "ellipse": _from_ellipse, "mask": _from_mask}
