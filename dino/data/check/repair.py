"""A cleaned copy of annotations: fixes what can be fixed, drops the rest, refuses to drop much."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from dino.data.coco import usable_box
from dino.data.coco_values import area_of
from dino.utils.files import DataError, counted

from .annotations import Contents, Object
from .issues import KINDS, Issue
from .notation import NOTATIONS, to_xywh

MAX_LOSS = 0.1  # fraction of the objects that may be dropped

_NO_LOSS = ("object_twice", "shared")  # the object stays elsewhere: once in this file, or in the validation data


class Repaired(NamedTuple):
    """A cleaned copy, and what became of the objects.

    Args:
        data: the copy.
        total, kept, changed: numbers of objects: of the file, of the copy, and of the copy with other values.
        images: number of images with other values.
        dropped: number of dropped objects, by kind of issue.
        categories: number of dropped classes.
    """

    data: dict[str, Any]
    total: int
    kept: int
    changed: int
    images: int
    dropped: Counter[str]
    categories: int

    def describe(self) -> list[str]:
        """Lines of text about the objects, and each cause of a loss."""
        head = f"{self.kept:,} of {counted(self.total, 'object')} kept, {self.changed:,} of them changed"
        causes = [f"{counted(number, 'object')} dropped: {_cause(kind)}" for kind, number in self.dropped.most_common()]
        images = [f"{counted(self.images, 'image')} changed"] * bool(self.images)
        classes = [f"{counted(self.categories, 'class', 'classes')} dropped: no objects of their own"]
        return [head, *images, *causes, *classes * bool(self.categories)]


def repair(
    original: dict[str, Any], data: dict[str, Any], contents: Contents, issues: list[Issue], max_loss: float = MAX_LOSS
) -> Repaired:
    """Fix what can be fixed and drop the rest.

    Dropping an image drops its objects. Super-categories without objects are dropped. Boxes are converted to xywh in
    pixels, clipped or dropped. If the id of an annotation is broken, all annotations are renumbered.

    Args:
        original, data: parsed annotations, and the corrected ones; both stay as they are.
        contents, issues: of the corrected ones; more issues of the same entries may be added.
        max_loss: fraction of the objects; 1 permits any loss. Copies, and images of the validation data, don't count.

    Raises:
        DataError: a person must decide about an issue, no image would remain, or too many objects, or all of a class,
            would go.
    """
    _refuse_undecided(issues)
    kept_parts = _kept_parts(data, contents, issues)
    if not kept_parts["images"]:
        raise DataError("can't fix: no image would remain")
    objects = _kept_objects(kept_parts["images"], contents, issues)
    kept = {index: entry for index, entry in _fix_boxes(objects, issues).items() if entry is not None}
    if _indices(issues, "renumber")["annotations"]:
        kept = {index: {**entry, "id": number} for number, (index, entry) in enumerate(kept.items(), 1)}
    result = Repaired(
        data={**data, **kept_parts, "annotations": list(kept.values())},
        total=len(data["annotations"]),
        kept=len(kept),
        changed=sum(original["annotations"][index] != entry for index, entry in kept.items()),
        images=sum(a != b for a, b in zip(original["images"], data["images"], strict=True)),
        dropped=_causes(data, issues, kept),
        categories=len(data["categories"]) - len(kept_parts["categories"]),
    )
    _refuse_loss(result, contents, kept, max_loss)
    return result


def _kept_parts(data: dict[str, Any], contents: Contents, issues: list[Issue]) -> dict[str, list[dict]]:
    """The images and the categories that stay."""
    dropped, sound = _indices(issues, "drop"), {id(entry) for entry in contents.images.values()}
    images = [e for i, e in enumerate(data["images"]) if id(e) in sound and i not in dropped["images"]]
    return {
        "images": images,
        "categories": [e for i, e in enumerate(data["categories"]) if i not in dropped["categories"]],
    }


def _kept_objects(images: list[dict], contents: Contents, issues: list[Issue]) -> list[Object]:
    """The objects of these images that stay."""
    kept, dropped = {entry["id"] for entry in images}, _indices(issues, "drop")["annotations"]
    return [o for o in contents.objects if o.index not in dropped and o.image["id"] in kept]


def _refuse_undecided(issues: list[Issue]) -> None:
    """Raise a DataError if a person must decide about an issue."""
    kinds = {issue.kind: KINDS[issue.kind] for issue in sorted(issues)}
    undecided = [kind for kind in kinds.values() if kind.level == "error" and kind.cure is None]
    if undecided:
        reasons = "; ".join(f"{kind.title} ({kind.advice})" for kind in undecided)
        raise DataError(f"can't fix without you: {reasons}")


def _refuse_loss(result: Repaired, contents: Contents, kept: dict[int, dict], max_loss: float) -> None:
    """Raise a DataError if too many objects, or all of a class, would go."""
    lost = sum(number for kind, number in result.dropped.items() if kind not in _NO_LOSS)
    reasons = []
    if lost and lost >= max_loss * result.total:
        reasons.append(f"{lost:,} of {counted(result.total, 'object')} would go")
    gone = _lost_classes(contents, kept)
    if gone and max_loss < 1:
        reasons.append(f"all objects of {', '.join(map(repr, gone))} would go")
    if reasons:
        causes = "; ".join(line for line in result.describe() if "dropped" in line)
        raise DataError(
            f"can't fix without losing labels: {', and '.join(reasons)} ({causes}). Correct these, or permit the loss: "
            "--max-loss 1"
        )


def _lost_classes(contents: Contents, kept: dict[int, dict]) -> list[str]:
    """Names of the classes whose objects all go."""
    left = {entry["category_id"] for entry in kept.values()}
    return [contents.categories[n]["name"] for n in sorted({o.entry["category_id"] for o in contents.objects} - left)]


def _cause(kind: str) -> str:
    return KINDS[kind].title


def _causes(data: dict[str, Any], issues: list[Issue], kept: dict[int, dict]) -> Counter[str]:
    """Number of objects that are dropped, by the kind of the issue that drops them: their own, or their image's."""
    lost = [issue for issue in issues if KINDS[issue.kind].cure == "drop"]
    by_index = {issue.index: issue.kind for issue in lost if issue.part == "annotations"}
    by_image = {_id_of(data["images"][issue.index], "id"): issue.kind for issue in lost if issue.part == "images"}
    by_image[None] = "reference"
    causes: Counter[str] = Counter()
    for index, entry in enumerate(data["annotations"]):
        if index not in kept:
            causes[by_index.get(index) or by_image.get(_id_of(entry, "image_id"), "outside")] += 1
    return causes


def _id_of(entry: Any, key: str) -> int | None:
    """A whole number of an entry; None where there is none."""
    number = entry.get(key) if isinstance(entry, dict) else None
    return number if type(number) is int else None


def _fix_boxes(objects: list[Object], issues: list[Issue]) -> dict[int, dict | None]:
    """Annotations, by index, with boxes converted or clipped; None where nothing remains inside the image."""
    notations = {issue.index: issue.kind for issue in issues if issue.kind in NOTATIONS}
    clipped = _indices(issues, "clip")["annotations"]
    annotations: dict[int, dict | None] = {}
    for o in objects:
        entry, (width, height) = o.entry, (o.image["width"], o.image["height"])
        if o.index in notations:
            entry = _with_box(entry, _clip(to_xywh(o.box, notations[o.index], width, height), o.image))
        elif o.index in clipped:
            entry = _with_box(entry, _clip(o.box, o.image))
        annotations[o.index] = entry
    return annotations


def _indices(issues: list[Issue], cure: str) -> dict[str, set[int]]:
    """Indices, by list of the file, of the entries that a cure applies to."""
    found: dict[str, set[int]] = defaultdict(set)
    for issue in issues:
        if KINDS[issue.kind].cure == cure:
            found[issue.part].add(issue.index)
    return found


def _clip(box: list[float], image: dict) -> list[float] | None:
    """The part of an xywh box inside the image; None if there is none."""
    clipped = usable_box(box, image["width"], image["height"])
    if clipped is None:
        return None
    x0, y0, x1, y1 = clipped
    return [x0, y0, x1 - x0, y1 - y0]


def _with_box(entry: dict, box: list[float] | None) -> dict | None:
    """A copy of an annotation with another box, and with the box's area unless it has an outline."""
    if box is None:
        return None
    return {**entry, "bbox": box, **({} if entry.get("segmentation") else {"area": area_of(box)})}
