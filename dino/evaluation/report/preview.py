"""A page of images with their boxes: images with issues first, marked, then a random choice."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

from dino.data.check.annotations import Object
from dino.data.check.issues import KINDS, Issue
from dino.data.check.splits import Split
from dino.inference.palette import colour_of
from dino.utils.files import DataError, counted, resolve_inside

from .page import Figure, Mark, draw, write_page

_SHOWN = 24  # images on the page
_NAMED = 60  # classes in the legend, as many as there are colours


def write_preview(path: str | Path, name: str, split: Split, issues: list[Issue]) -> None:
    """Write the page: images with issues first, errors before warnings, with what is wrong; then a random choice.

    Args:
        name: of the data, for the title.

    Raises:
        UserError: the page can't be written.
    """
    counts = Counter(issue.kind for issue in issues)
    flags = _flags_of(split, issues)
    categories = split.contents.categories
    write_page(
        path,
        "preview.html.j2",
        name=name,
        images=len(split.contents.images),
        objects=len(split.contents.objects),
        legend=[(categories[i]["name"], colour_of(label)) for label, i in enumerate(sorted(categories)[:_NAMED])],
        classes=len(categories),
        issues=[(kind, counts[key]) for key, kind in KINDS.items() if counts[key]],
        flagged=len(flags),
        figures=_draw_sample(split, issues, flags),
    )


def _draw_sample(split: Split, issues: list[Issue], flags: dict[int, list[tuple[str, str]]]) -> list[Figure]:
    """Up to _SHOWN figures; an image that can't be read is one where it has an issue."""
    objects: dict[int, list[Object]] = defaultdict(list)
    for o in split.contents.objects:
        objects[o.image["id"]].append(o)
    reasons: dict[int, list[str]] = defaultdict(list)
    for issue in issues:
        if issue.part == "annotations":
            reasons[issue.index].append(KINDS[issue.kind].title)
    labels = {number: label for label, number in enumerate(sorted(split.contents.categories))}
    figures: list[Figure] = []
    for image in _sorted(split, flags):
        marks = [_mark_of(o, split.contents.categories, labels, reasons) for o in objects[image["id"]]]
        figure = _draw_image(split, image, marks)._replace(flags=flags.get(image["id"], []))
        if figure.source or figure.flags:
            figures.append(figure)
        if len(figures) == _SHOWN:
            break
    return figures


def _draw_image(split: Split, image: dict, marks: list[Mark]) -> Figure:
    """The figure of an image; without a picture where the file can't be read."""
    try:
        return draw(resolve_inside(split.folder, image["file_name"]), _caption(image, marks), marks)
    except DataError:
        return Figure("", 4, 3, _caption(image, marks), [])


def _flags_of(split: Split, issues: list[Issue]) -> dict[int, list[tuple[str, str]]]:
    """Image id -> level and text of each kind of issue that the image or its objects have, errors first."""
    images = {index: image["id"] for index, image in split.images}
    owners = {o.index: o.image["id"] for o in split.contents.objects}
    kinds: dict[int, Counter] = defaultdict(Counter)
    for issue in issues:
        image = {"images": images, "annotations": owners}.get(issue.part, {}).get(issue.index)
        if image is not None:
            kinds[image][issue.kind] += 1
    return {image: sorted(_flag(kind, count) for kind, count in own.items()) for image, own in kinds.items()}


def _flag(key: str, count: int) -> tuple[str, str]:
    """Level and text: "error" sorts before "warning"."""
    return KINDS[key].level, KINDS[key].title + (f": {count:,}" if count > 1 else "")


def _sorted(split: Split, flags: dict[int, list[tuple[str, str]]]) -> list[dict]:
    """Images with errors, those with warnings, then all others, each in random order."""
    images = [image for _, image in split.images]
    random.Random(0).shuffle(images)
    return sorted(images, key=lambda image: flags[image["id"]][0][0] if image["id"] in flags else "without")


def _mark_of(o: Object, categories: dict[int, dict], labels: dict[int, int], reasons: dict[int, list[str]]) -> Mark:
    """The named box of an object in the colour of its class; of one with issues, dashed in red with what is wrong."""
    name = categories[o.entry["category_id"]]["name"]
    if o.index in reasons:
        return Mark(o.box, f"{name}: {', '.join(reasons[o.index])}", "bad named")
    return Mark(o.box, name, "class named", colour=colour_of(labels[o.entry["category_id"]]))


def _caption(image: dict, marks: list[Mark]) -> str:
    """File name and numbers."""
    bad = sum(mark.kind.startswith("bad") for mark in marks)
    return f"{image['file_name']}: {counted(len(marks), 'object')}" + (f", {bad:,} with an issue" if bad else "")
