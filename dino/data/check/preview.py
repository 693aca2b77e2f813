"""A page of images with their boxes: those with faults first, then a random choice."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

from dino.evaluation.report.page import Figure, Mark, draw, write_page
from dino.utils.files import DataError, resolve_inside

from .annotations import Object
from .issues import KINDS, Fault
from .splits import Split

SHOWN = 24  # images on the page
COLOURS = 8  # of classes, in the page's style


def write_sheet(path: str | Path, name: str, split: Split, faults: list[Fault]) -> None:
    """Write the page. Images whose files can't be read are left out of it.

    Args:
        name: of the data, for the title.

    Raises:
        DataError: the page can't be written.
    """
    counts = Counter(fault.kind for fault in faults)
    write_page(
        path,
        "sheet.html.j2",
        name=name,
        images=len(split.contents.images),
        objects=len(split.contents.objects),
        names=[split.contents.categories[number]["name"] for number in sorted(split.contents.categories)],
        faults=[(kind, counts[key]) for key, kind in KINDS.items() if counts[key]],
        figures=draw_sample(split, faults),
    )


def draw_sample(split: Split, faults: list[Fault]) -> list[Figure]:
    """Up to SHOWN figures."""
    objects: dict[int, list[Object]] = defaultdict(list)
    for o in split.contents.objects:
        objects[o.image["id"]].append(o)
    reasons = {fault.index: KINDS[fault.kind].title for fault in faults if fault.part == "annotations"}
    suspects = {o.image["id"] for o in split.contents.objects if o.index in reasons}
    images = [image for _, image in split.images]
    random.Random(0).shuffle(images)
    images.sort(key=lambda image: image["id"] not in suspects)
    labels = {number: label for label, number in enumerate(sorted(split.contents.categories))}
    figures: list[Figure] = []
    for image in images:
        if len(figures) == SHOWN:
            break
        marks = [mark_of(o, split.contents.categories, labels, reasons) for o in objects[image["id"]]]
        try:
            figures.append(draw(resolve_inside(split.folder, image["file_name"]), caption(image, marks), marks))
        except DataError:  # it is among the faults
            continue
    return figures


def mark_of(o: Object, categories: dict[int, dict], labels: dict[int, int], reasons: dict[int, str]) -> Mark:
    """The box of an object in the colour of its class, or in that of faults."""
    name = categories[o.entry["category_id"]]["name"]
    if o.index in reasons:
        return Mark(o.box, name, "bad", title=f"{name}: {reasons[o.index]}")
    return Mark(o.box, name, f"class-{labels[o.entry['category_id']] % COLOURS}")


def caption(image: dict, marks: list[Mark]) -> str:
    """File name and numbers."""
    bad = sum(mark.kind == "bad" for mark in marks)
    return f"{image['file_name']}: {len(marks)} objects" + (f", {bad} with a fault" if bad else "")
