"""A cleaned copy of annotations: fixes what can be fixed, drops the rest."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dino.data.coco import usable_box
from dino.utils.files import DataError, counted

from .annotations import Contents, Object, from_corners
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
    _refuse_undecided(issues)
    images, categories = (_kept(data, issues, part) for part in ("images", "categories"))
    if not images:
        raise DataError("can't fix: no image would remain")
    ids, dropped = {entry["id"] for entry in images}, _indices(issues, "drop")["annotations"]
    objects = [o for o in contents.objects if o.index not in dropped and o.image["id"] in ids]
    fixed = {**data, "images": images, "annotations": _fix_boxes(objects, issues), "categories": categories}
    return fixed, _describe(data, fixed, issues)


def _refuse_undecided(issues: list[Issue]) -> None:
    """Raise a DataError if a person must decide about an issue."""
    kinds = {issue.kind: KINDS[issue.kind] for issue in sorted(issues)}
    undecided = [kind for kind in kinds.values() if kind.level == "error" and kind.cure is None]
    if undecided:
        reasons = "; ".join(f"{kind.title} ({kind.advice})" for kind in undecided)
        raise DataError(f"can't fix without you: {reasons}")


def _kept(data: dict[str, Any], issues: list[Issue], part: str) -> list[dict]:
    """The entries of a list of the file, without those to drop."""
    dropped = _indices(issues, "drop")[part]
    return [entry for index, entry in enumerate(data[part]) if index not in dropped]


def _fix_boxes(objects: list[Object], issues: list[Issue]) -> list[dict]:
    """Annotations with boxes converted or clipped, and renumbered where an id is broken."""
    corners, clipped = _indices(issues, "convert")["annotations"], _indices(issues, "clip")["annotations"]
    annotations = []
    for o in objects:
        entry = o.entry
        if o.index in corners:
            entry = _with_box(entry, _clip(from_corners(o.box), o.image))
        elif o.index in clipped:
            entry = _with_box(entry, _clip(o.box, o.image))
        annotations.append(entry)
    if _indices(issues, "renumber")["annotations"]:
        return [{**entry, "id": number} for number, entry in enumerate(annotations, 1)]
    return annotations


def _describe(data: dict[str, Any], fixed: dict[str, Any], issues: list[Issue]) -> list[str]:
    """A line of text for each kind of change."""
    dropped = {part: len(data[part]) - len(fixed[part]) for part in ("images", "annotations", "categories")}
    removed = _indices(issues, "drop")["annotations"]
    converted, clipped = (len(_indices(issues, cure)["annotations"] - removed) for cure in ("convert", "clip"))
    changes = [
        (dropped["images"], "image", "images", "dropped"),
        (dropped["annotations"], "object", "objects", "dropped"),
        (converted, "box", "boxes", "converted from corners"),
        (clipped, "box", "boxes", "clipped"),
        (dropped["categories"], "class", "classes", "dropped"),
    ]
    return [f"{counted(number, one, many)} {change}" for number, one, many, change in changes if number]


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
