"""Which program wrote annotations: from endings and keys, without reading all of a file's content."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Format -> what it is, for a message; those with a reader can be imported.
FORMATS = {
    "yolo": "a YOLO data set",
    "voc": "annotations in Pascal VOC's format",
    "cvat": "annotations of CVAT",
    "labelme": "annotations of labelme",
    "label_studio": "tasks of Label Studio",
    "create_ml": "annotations in CreateML's format",
    "panoptic": "COCO's panoptic annotations, whose segments are in PNG files: use instances_*.json",
    "captions": "COCO's captions, which have no boxes: use instances_*.json",
    "keypoints": "keypoints without boxes: add a bbox to each annotation, or use instances_*.json",
    "coco_folder": "files in COCO's format: name the JSON file, and the folder of its images",
    "open_images": "a table of Open Images: convert it to COCO first",
    "archive": "a ZIP archive: unpack it first",
    "results": "detections in COCO's results format: `dino eval --results` compares them with annotations",
}
IMPORTED = ("yolo", "voc", "cvat", "labelme", "label_studio", "create_ml")

_HEAD = 1 << 14  # bytes of a file that decide
_LARGEST = 1 << 28  # bytes of a JSON file in a folder that is looked at
_MOST = 2000  # entries of a folder that are looked at


def recognise(path: Path, content: Any = None) -> str | None:
    """The format of a source, a key of FORMATS; None for COCO's own format and for unknown ones.

    Args:
        path: a file or folder.
        content: what a JSON file holds, parsed.
    """
    if path.is_dir():
        return _recognise_folder(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yolo"
    if content is None:
        return _recognise_start(path, _start(path))
    return _recognise_list(content) if isinstance(content, list) else _recognise_dict(content)


def explain(path: Path, content: Any = None) -> str:
    """One sentence about a source that is not in COCO's format, and what to do; empty if it is not recognised."""
    found = recognise(path, content)
    if found is None:
        return ""
    cure = f". Convert it: dino data import {path} train.json" if found in IMPORTED else ""
    return f"it holds {FORMATS[found]}{cure}"


def _recognise_folder(path: Path) -> str | None:
    """By the first files that decide, those in sub-folders too."""
    names = {entry.name for entry in itertools.islice(path.iterdir(), _MOST)}
    if names & {"classes.txt", "obj.names", "labels"} or any(name.endswith((".yaml", ".yml")) for name in names):
        return "yolo"
    found = None
    for file in itertools.islice(_first_files(path), _MOST):
        form = "yolo" if file.name == "labels" else _recognise_inside(file)
        if form in IMPORTED:
            return form
        found = found or form
    return found


def _first_files(path: Path) -> Iterator[Path]:
    """XML and JSON files of a folder and its sub-folders, and folders called `labels` beside `images`."""
    for directory, folders, files in itertools.islice(os.walk(path), _MOST):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        if {"labels", "images"} <= set(folders):
            yield Path(directory, "labels")
        names = (name for name in sorted(files) if name.endswith((".xml", ".json")) and not name.startswith("."))
        yield from (Path(directory, name) for name in names)


def _recognise_inside(path: Path) -> str | None:
    """The format of a file in a folder; a file in COCO's format counts as one there."""
    if path.suffix == ".xml":
        return recognise(path)
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size < _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
        return _recognise_dict(content) or "coco_folder"
    return recognise(path, content) if isinstance(content, dict | list) else None


def _recognise_start(path: Path, start: bytes) -> str | None:
    """The format of a file that is no JSON."""
    if path.suffix.lower() == ".xml":
        return "cvat" if b"<annotations" in start else "voc" if b"<annotation" in start else None
    if start.startswith(b"PK\x03\x04"):
        return "archive"
    return "open_images" if start.startswith(b"ImageID,") else None


def _start(path: Path) -> bytes:
    """The first bytes of a file."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _recognise_list(content: list) -> str | None:
    first = content[0] if content and isinstance(content[0], dict) else {}
    if "score" in first and "image_id" in first:
        return "results"
    if isinstance(first.get("data"), dict):
        return "label_studio"
    if not {"image", "imagefilename"} & first.keys():
        return None
    if isinstance(first.get("annotations", first.get("annotation")), list):
        return "create_ml"
    return "label_studio" if "annotator" in first or any(map(_is_minimal, first.values())) else None


def _is_minimal(value: Any) -> bool:
    """Whether a value is a list of regions, as in Label Studio's JSON-MIN."""
    region = value[0] if isinstance(value, list) and value else None
    return isinstance(region, dict) and bool({"original_width", "rectanglelabels"} & region.keys())


def _recognise_dict(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if "shapes" in content and "imagePath" in content:
        return "labelme"
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return _recognise_annotation(first) if isinstance(first, dict) else None


def _recognise_annotation(first: dict) -> str | None:
    """One of COCO's other formats, from its first annotation."""
    if first.get("bbox") or first.get("segmentation"):
        return None
    keys = {"segments_info": "panoptic", "caption": "captions", "keypoints": "keypoints"}
    return next((form for key, form in keys.items() if key in first), None)
