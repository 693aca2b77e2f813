"""A cleaned copy of annotations: what can be put right is, what can't be trusted is left out."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dino.data.coco import usable_box
from dino.utils.files import DataError, counted

from .annotations import Contents, from_corners
from .issues import KINDS, Issue


def repair(data: dict[str, Any], contents: Contents, issues: list[Issue]) -> tuple[dict[str, Any], list[str]]:
    """Fix what can be fixed and drop the rest.

    Dropping an image drops its objects. Super-categories without objects are dropped. Boxes are converted from corners,
    clipped or dropped. If the id of an annotation is broken, all annotations are renumbered. Nothing else changes.

    Args:
        data: parsed annotations, which stay as they are.
        contents, issues: from `find_issues`; more issues of the same entries may be added.

    Returns:
        the cleaned copy, and a line of text for each kind of change.

    Raises:
        DataError: a person must decide about an issue, or no image would remain.
    """
    undecided = sorted({f.kind for f in issues if KINDS[f.kind].level == "error" and KINDS[f.kind].cure is None})
    if undecided:
        reasons = "; ".join(f"{KINDS[kind].title} ({KINDS[kind].advice})" for kind in undecided)
        raise DataError(f"can't fix without you: {reasons}")
    dropped = _indices(issues, "drop")
    images = [entry for index, entry in enumerate(data["images"]) if index not in dropped["images"]]
    if not images:
        raise DataError("can't fix: no image would remain")
    kept = {entry["id"] for entry in images}
    corners, clipped = _indices(issues, "convert")["annotations"], _indices(issues, "clip")["annotations"]
    annotations = []
    for o in contents.objects:
        if o.index in dropped["annotations"] or o.image["id"] not in kept:
            continue
        entry = o.entry
        if o.index in corners:
            entry = _with_box(entry, _clip(from_corners(entry["bbox"]), o.image))
        elif o.index in clipped:
            entry = _with_box(entry, _clip(entry["bbox"], o.image))
        annotations.append(entry)
    if _indices(issues, "renumber")["annotations"]:
        annotations = [{**entry, "id": number} for number, entry in enumerate(annotations, 1)]
    categories = [entry for index, entry in enumerate(data["categories"]) if index not in dropped["categories"]]
    changes = [
        (len(data["images"]) - len(images), "image", "images", "dropped"),
        (len(data["annotations"]) - len(annotations), "object", "objects", "dropped"),
        (len(corners - dropped["annotations"]), "box", "boxes", "converted from corners"),
        (len(clipped - dropped["annotations"]), "box", "boxes", "clipped"),
        (len(data["categories"]) - len(categories), "class", "classes", "dropped"),
    ]
    lines = [f"{counted(number, one, many)} {what}" for number, one, many, what in changes if number]
    fixed = {**data, "images": images, "annotations": annotations, "categories": categories}
    return fixed, lines


def _indices(issues: list[Issue], cure: str) -> dict[str, set[int]]:
    """Indices, by list of the file, of the entries that a cure applies to."""
    found: dict[str, set[int]] = defaultdict(set)
    for issue in issues:
        if KINDS[issue.kind].cure == cure:
            found[issue.part].add(issue.index)
    return found


def _clip(box: list[float], image: dict) -> list[float]:
    """The part of an xywh box inside the image."""
    x0, y0, x1, y1 = usable_box(box, image["width"], image["height"])
    return [x0, y0, x1 - x0, y1 - y0]


def _with_box(entry: dict, box: list[float]) -> dict:
    """A copy of an annotation with another box, and with the box's area unless it has an outline."""
    return {**entry, "bbox": box, **({} if entry.get("segmentation") else {"area": box[2] * box[3]})}
