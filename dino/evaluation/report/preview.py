"""A page of images with their boxes: images with issues first, then a random choice."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from dino.data.check.annotations import Object
from dino.data.check.issues import KINDS, Issue
from dino.data.check.splits import Split
from dino.utils.files import DataError, resolve_inside

from .page import Figure, Mark, draw, write_page

_SHOWN = 24  # images on the page
_COLOURS = 8  # of classes, in the page's style


def write_preview(path: str | Path, name: str, split: Split, issues: list[Issue]) -> None:
    """Write the page, without images whose files can't be read.

    Args:
        name: of the data, for the title.

    Raises:
        UserError: the page can't be written.
    """
    counts = Counter(issue.kind for issue in issues)
    write_page(
        path,
        "preview.html.j2",
        name=name,
        images=len(split.contents.images),
        objects=len(split.contents.objects),
        names=[split.contents.categories[number]["name"] for number in sorted(split.contents.categories)],
        issues=[(kind, counts[key]) for key, kind in KINDS.items() if counts[key]],
        figures=_draw_sample(split, issues),
    )


def _draw_sample(split: Split, issues: list[Issue]) -> list[Figure]:
    """Up to _SHOWN figures."""
    objects: dict[int, list[Object]] = defaultdict(list)
    for o in split.contents.objects:
        objects[o.image["id"]].append(o)
    reasons = {issue.index: KINDS[issue.kind].title for issue in issues if issue.part == "annotations"}
    labels = {number: label for label, number in enumerate(sorted(split.contents.categories))}
    figures: list[Figure] = []
    for image in _shuffled(split, reasons):
        if len(figures) == _SHOWN:
            break
        marks = [_mark_of(o, split.contents.categories, labels, reasons) for o in objects[image["id"]]]
        with suppress(DataError):  # a file that can't be read is one of the issues
            figures.append(draw(resolve_inside(split.folder, image["file_name"]), _caption(image, marks), marks))
    return figures


def _shuffled(split: Split, reasons: dict[int, str]) -> list[dict]:
    """Images in random order, those with an object among the `reasons` first."""
    suspects = {o.image["id"] for o in split.contents.objects if o.index in reasons}
    images = [image for _, image in split.images]
    random.Random(0).shuffle(images)
    return sorted(images, key=lambda image: image["id"] not in suspects)


def _mark_of(o: Object, categories: dict[int, dict], labels: dict[int, int], reasons: dict[int, str]) -> Mark:
    """The box of an object, in the colour of its class or of issues."""
    name = categories[o.entry["category_id"]]["name"]
    if o.index in reasons:
        return Mark(o.box, name, "bad", title=f"{name}: {reasons[o.index]}")
    return Mark(o.box, name, f"class-{labels[o.entry['category_id']] % _COLOURS}")


def _caption(image: dict, marks: list[Mark]) -> str:
    """File name and numbers."""
    bad = sum(mark.kind == "bad" for mark in marks)
    return f"{image['file_name']}: {len(marks)} objects" + (f", {bad} with an issue" if bad else "")
