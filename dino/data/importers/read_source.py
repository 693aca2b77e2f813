"""One entrance to all readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino.data.coco import load_json
from dino.utils.files import DataError

from .json_formats import read_create_ml, read_label_studio, read_labelme
from .recognition import FORMATS, IMPORTED, recognise
from .source import Source
from .xml_formats import read_cvat, read_voc
from .yolo import read_yolo

_READERS = {
    "cvat": read_cvat,
    "voc": read_voc,
    "labelme": read_labelme,
    "label_studio": read_label_studio,
    "create_ml": read_create_ml,
}


def read_source(path: Path, images: Path | None = None) -> dict[str, Source]:
    """Read annotations of another program -> its data sets: "train", and "val" and "test" where the source has them.

    Args:
        path: a file or folder; its format is recognised.
        images: folder of the images; None for where the program puts them.

    Raises:
        DataError: the format is unknown, or the files are broken.
    """
    if not path.exists():
        raise DataError(f"source not found: {path}")
    if path.is_file() and path.suffix.lower() == ".xml" and recognise(path) == "voc":
        path = path.parent
    content = _content(path)
    found = recognise(path, content)
    if found is None:
        raise DataError(f"{path}: {_describe_unknown(content)}")
    if found not in IMPORTED:
        raise DataError(f"{path} holds {FORMATS[found]}")
    sources = read_yolo(path) if found == "yolo" else _READERS[found](path, images)
    if not any(source.images for source in sources.values()):
        raise DataError(f"{path}: no annotated images")
    return sources


def _describe_unknown(content: Any) -> str:
    """Why a source can't be imported whose format has no reader."""
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
        return "COCO's format already: use the file as it is, after `dino check`"
    return f"unknown format. These can be imported: {', '.join(IMPORTED)}"


def _content(path: Path) -> Any:
    """A JSON file, parsed; None for others."""
    is_json = path.suffix.lower() == ".json" and path.is_file()
    return load_json(path, "annotations") if is_json else None
