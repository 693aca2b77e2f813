"""Pascal VOC, a file for each image, and "CVAT for images", one file for all."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from dino.utils.files import DataError

from .source import Source, SourceImage, SourceObject, around, number

_LARGEST = 500_000_000  # bytes
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


def read_voc(folder: Path, images: Path | None = None) -> Source:
    """Read a folder of Pascal VOC files. Corners are used as they are written, as labelImg means them.

    Args:
        folder: of the XML files, or one that has them in `Annotations`.
        images: folder of the images; None for `JPEGImages` beside them, or the same folder.

    Raises:
        DataError: a file is broken or names no image.
    """
    files = sorted(folder.glob("*.xml")) or sorted(folder.glob("Annotations/*.xml"))
    if not files:
        raise DataError(f"{folder}: no XML files")
    beside = files[0].parent.parent / "JPEGImages"
    found = [_read_voc_file(file) for file in files]
    return Source(images or (beside if beside.is_dir() else folder), [], found)


def _read_voc_file(path: Path) -> SourceImage:
    """One image and its objects."""
    root = parse_xml(path)
    name = root.findtext("filename")
    if root.tag != "annotation" or not name:
        raise DataError(f"{path}: no Pascal VOC file: <annotation> with a <filename>")
    objects = []
    for index, entry in enumerate(root.iter("object"), 1):
        where = f"{path}, object {index}"
        x0, y0, x1, y1 = (number(entry.findtext(f"bndbox/{key}"), f"{where}, {key}") for key in _CORNERS)
        objects.append(SourceObject(where, _named(entry.findtext("name"), where), [x0, y0, x1 - x0, y1 - y0]))
    return SourceImage(name, str(path), objects)


def _named(name: str | None, where: str) -> str:
    """The name of a class."""
    if not name or not name.strip():
        raise DataError(f"{where}: it has no class")
    return name.strip()


def read_cvat(path: Path, images: Path | None = None) -> Source:
    """Read the annotations.xml of "CVAT for images 1.1": boxes, rotated ones too, outlines, ellipses and masks.

    Args:
        images: folder of the images; None for `images` beside the file, or the file's folder.

    Raises:
        DataError: the file is broken, or of a video.
    """
    root = parse_xml(path)
    if root.tag != "annotations" or root.find("image") is None:
        video = " of a video: export it as COCO, or as CVAT for images" if root.find("track") is not None else ""
        raise DataError(f"{path}: no annotations of images{video}")
    beside = path.parent / "images"
    names = [text for text in (label.findtext("name") for label in root.iterfind("meta//labels/label")) if text]
    found = [_read_cvat_image(path, image) for image in root.iterfind("image")]
    return Source(images or (beside if beside.is_dir() else path.parent), names, found)


def _read_cvat_image(path: Path, image: Element) -> SourceImage:
    """An image and its objects; points and lines have no box."""
    where = f"{path}, image {image.get('name')!r}"
    objects = []
    for index, shape in enumerate(image, 1):
        if shape.tag in _CVAT_SHAPES:
            place = f"{where}, shape {index}"
            box = _CVAT_SHAPES[shape.tag](shape, place)
            objects.append(SourceObject(place, _named(shape.get("label"), place), box))
    return SourceImage(image.get("name", ""), where, objects, len(image) - len(objects))


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
    return [x - rx, y - ry, 2 * rx, 2 * ry]


def _from_mask(shape: Element, where: str) -> list[float]:
    return [number(shape.get(key), f"{where}, {key}") for key in ("left", "top", "width", "height")]


_CVAT_SHAPES = {"box": _from_box, "polygon": _from_outline, "ellipse": _from_ellipse, "mask": _from_mask}
