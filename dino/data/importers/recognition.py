"""Which program wrote annotations: from endings and keys, without reading all of a file's content."""

from __future__ import annotations

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
    "results": "detections in COCO's results format: `dino eval --results` compares them with annotations",
}
IMPORTED = ("yolo", "voc", "cvat", "labelme", "label_studio", "create_ml")


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
    if path.suffix.lower() == ".xml":
        return "cvat" if b"<annotations" in _start(path) else "voc"
    return _recognise_list(content) if isinstance(content, list) else _recognise_dict(content)


def explain(path: Path, content: Any = None) -> str:
    """One sentence about a source that is not in COCO's format, and what to do; empty if it is not recognised."""
    found = recognise(path, content)
    if found is None:
        return ""
    cure = f". Convert it: dino data import {path} train.json" if found in IMPORTED else ""
    return f"it holds {FORMATS[found]}{cure}"


def _recognise_folder(path: Path) -> str | None:
    if any(path.glob("*.y*ml")) or (path / "classes.txt").is_file() or (path / "obj.names").is_file():
        return "yolo"
    if (path / "labels").is_dir() and (path / "images").is_dir():
        return "yolo"
    if (path / "annotations.xml").is_file():
        return "cvat"
    if any(path.glob("*.xml")) or any(path.glob("Annotations/*.xml")):
        return "voc"
    return "labelme" if any(path.glob("*.json")) else None


def _start(path: Path) -> bytes:
    """The first bytes of a file."""
    try:
        with open(path, "rb") as file:
            return file.read(1000)
    except OSError:
        return b""


def _recognise_list(content: list) -> str | None:
    keys = set(content[0]) if content and isinstance(content[0], dict) else set()
    if {"score", "image_id"} <= keys:
        return "results"
    if "data" in keys or {"image", "annotator"} <= keys or {"image", "label"} <= keys:
        return "label_studio"
    return "create_ml" if "annotations" in keys and keys & {"image", "imagefilename"} else None


def _recognise_dict(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if "shapes" in content and "imagePath" in content:
        return "labelme"
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if not isinstance(first, dict) or "bbox" in first or "segmentation" in first:
        return None
    kinds = {"segments_info": "panoptic", "caption": "captions", "keypoints": "keypoints"}
    return next((kind for key, kind in kinds.items() if key in first), None)
