"""A cleaned copy of annotations: what can be put right is, what can't be trusted is left out."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dino.data.coco import usable_box
from dino.utils.files import DataError, counted

from .annotations import Contents, from_corners
from .issues import KINDS, Fault


def repair(data: dict[str, Any], contents: Contents, faults: list[Fault]) -> tuple[dict[str, Any], list[str]]:
    """A copy of the data without the faults, and lines that say what was changed.

    An image is left out together with its objects, and a super-category that has none is no class. Object boxes are
    converted from corners, clipped or left out, and ids of annotations are given anew where one was faulty. Nothing
    else changes, and the data itself stays as it is.

    Args:
        data: parsed annotations. contents, faults: as found in them; further faults of the same entries may be added.

    Raises:
        DataError: a fault needs a decision that a program can't make, or no image would remain.
    """
    hopeless = sorted({f.kind for f in faults if KINDS[f.kind].level == "error" and KINDS[f.kind].cure is None})
    if hopeless:
        reasons = "; ".join(f"{KINDS[kind].title} ({KINDS[kind].advice})" for kind in hopeless)
        raise DataError(f"can't repair by itself: {reasons}")
    dropped = places(faults, "drop")
    images = [entry for index, entry in enumerate(data["images"]) if index not in dropped["images"]]
    if not images:
        raise DataError("can't repair: no image would remain")
    kept = {entry["id"] for entry in images}
    corners, clipped = places(faults, "convert")["annotations"], places(faults, "clip")["annotations"]
    annotations = []
    for o in contents.objects:
        if o.index in dropped["annotations"] or o.image["id"] not in kept:
            continue
        entry = o.entry
        if o.index in corners:
            entry = with_box(entry, clip(from_corners(entry["bbox"]), o.image))
        elif o.index in clipped:
            entry = with_box(entry, clip(entry["bbox"], o.image))
        annotations.append(entry)
    if places(faults, "renumber")["annotations"]:
        annotations = [{**entry, "id": number} for number, entry in enumerate(annotations, 1)]
    categories = [entry for index, entry in enumerate(data["categories"]) if index not in dropped["categories"]]
    changes = [
        (len(data["images"]) - len(images), "image", "images", "left out"),
        (len(data["annotations"]) - len(annotations), "object", "objects", "left out"),
        (len(corners - dropped["annotations"]), "box", "boxes", "converted from corners"),
        (len(clipped - dropped["annotations"]), "box", "boxes", "clipped"),
        (len(data["categories"]) - len(categories), "class", "classes", "left out"),
    ]
    told = [f"{counted(number, one, many)} {what}" for number, one, many, what in changes if number]
    fixed = {**data, "images": images, "annotations": annotations, "categories": categories}
    return fixed, told


def places(faults: list[Fault], cure: str) -> dict[str, set[int]]:
    """The entries to which a cure applies: places in each list of the file."""
    found: dict[str, set[int]] = defaultdict(set)
    for fault in faults:
        if KINDS[fault.kind].cure == cure:
            found[fault.part].add(fault.index)
    return found


def clip(box: list[float], image: dict) -> list[float]:
    """The part of an xywh box that lies in the image."""
    x0, y0, x1, y1 = usable_box(box, image["width"], image["height"])
    return [x0, y0, x1 - x0, y1 - y0]


def with_box(entry: dict, box: list[float]) -> dict:
    """A copy of an annotation with another box, and the area that follows unless an outline gives it."""
    return {**entry, "bbox": box, **({} if entry.get("segmentation") else {"area": box[2] * box[3]})}
