"""Likely label errors for people: lines on the terminal, pictures of each kind, and a file for annotation tools."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino.evaluation.label_errors import KINDS, LabelError
from dino.utils.files import DataError, resolve_inside, write_whole

from .page import Figure, Mark, draw, write_page

_SURROUNDINGS, _LEAST_SIDE = 1.0, 96  # of a drawn box: on each side, of its longer side; pixels of a picture at least


class _KindShown(NamedTuple):
    """The errors of a kind: what it is, how many there are, pictures of the likeliest."""

    kind: str
    title: str
    count: int
    figures: list[Figure]


def write_label_errors(
    path: Path | None, name: str, data: dict[str, Any], errors: Sequence[LabelError], folder: Path, show: int
) -> None:
    """Print likely label errors and, where a file is named, write them and the page that draws them.

    Args:
        path: of the COCO-format file, see `write_proposals`; the page has the suffix ".html". None for no files.
        name: of the data, for the title.
        folder: of the images; unreadable ones are not drawn.
        show: how many of each kind to print and to draw.

    Raises:
        UserError: a file can't be written.
    """
    print(_list(data, errors, show))
    if path:
        files = {image["id"]: resolve_inside(folder, image["file_name"]) for image in data["images"]}
        kinds = draw_label_errors(data, errors, files, show)
        page = path.with_suffix(".html")
        write_page(page, "label_errors.html.j2", name=name, total=len(errors), label_errors=kinds)
        write_proposals(path, data, errors)
        print(f"proposals written to {path}, drawn in {page}")


def draw_label_errors(
    data: dict[str, Any], errors: Sequence[LabelError], files: Mapping[int, Path], shown: int
) -> list[_KindShown]:
    """The kinds that occur, each with up to `shown` pictures; `files`: by image id, unreadable ones are not drawn."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    images = {image["id"]: image for image in data["images"]}
    neighbours = defaultdict(list)
    for a in data["annotations"]:
        neighbours[a["image_id"]].append(a)
    kinds = []
    for kind, title in KINDS.items():
        own = [error for error in errors if error.kind == kind]
        figures: list[Figure] = []
        for rank, error in enumerate(own, 1):
            if len(figures) == shown:
                break
            figures += _try_to_draw(error, rank, images[error.image_id], neighbours[error.image_id], names, files)
        if own:
            kinds.append(_KindShown(kind, title, len(own), figures))
    return kinds


def _try_to_draw(
    error: LabelError, rank: int, image: dict, neighbours: list[dict], names: dict[int, str], files: Mapping[int, Path]
) -> list[Figure]:
    """The surroundings of a proposal, with all annotations there; none where the image can't be read."""
    others = [a for a in neighbours if a is not error.annotation]
    marks = [Mark(a["bbox"], names[a["category_id"]], "class") for a in others]
    if error.annotation:
        rather = f", rather {names[error.category_id]}" if error.kind == "class" else ""
        text = f"annotated: {names[error.annotation['category_id']]}{rather}"
        marks.append(Mark(error.annotation["bbox"], text, "bad named"))
    if error.kind in ("missing", "box"):
        marks.append(Mark(error.box, f"proposed: {names[error.category_id]}", "prediction named"))
    caption = f"{rank}. {_describe(error, names)}, {image['file_name']}"
    try:
        return [draw(files[error.image_id], caption, marks, window=_window(error, image))]
    except DataError:
        return []


def _window(error: LabelError, image: dict) -> list[int]:
    """xyxy in whole pixels: the boxes of a proposal with their surroundings, inside the image."""
    boxes = [error.box, error.annotation["bbox"] if error.annotation else error.box]
    side = max(max(box[2:]) for box in boxes)
    (x0, x1), (y0, y1) = (_range_of(boxes, axis, image[size], side) for axis, size in enumerate(("width", "height")))
    return [x0, y0, x1, y1]


def _range_of(boxes: list[list[float]], axis: int, limit: int, side: float) -> tuple[int, int]:
    """First pixel, and the one after the last, of boxes with their surroundings along an axis of `limit` pixels."""
    low, high = min(b[axis] for b in boxes), max(b[axis] + b[axis + 2] for b in boxes)
    margin = max(_SURROUNDINGS * side, (_LEAST_SIDE - (high - low)) / 2)
    start = max(min(int(low - margin), limit - 1), 0)
    return start, max(min(int(high + margin) + 1, limit), start + 1)


def _describe(error: LabelError, names: Mapping[int, str]) -> str:
    """A few words: kind, class, score."""
    now = names[error.annotation["category_id"]] if error.annotation else ""
    new = names[error.category_id]
    what = {"missing": f"missing {new}", "class": f"{now}, rather {new}", "box": f"box of {now}"}
    return f"{what.get(error.kind, f'no {now} here')} ({error.score:.2f})"


def _list(data: dict[str, Any], errors: Sequence[LabelError], show: int) -> str:
    """Lines for a terminal: each kind with its number and its first `show` proposals."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    files = {image["id"]: image["file_name"] for image in data["images"]}
    lines = [f"likely label errors: {len(errors):,}"]
    for kind, title in KINDS.items():
        own = [error for error in errors if error.kind == kind]
        lines += [f"{kind}: {title} ({len(own):,})"] if own else []
        lines += [f"  {_describe(error, names)}: {files[error.image_id]}{_where(error)}"[:300] for error in own[:show]]
        lines += [f"  … and {len(own) - show:,} more"] if len(own) > show else []
    return "\n".join(lines)


def _where(error: LabelError) -> str:
    """The annotation in doubt, if there is one, and the box."""
    number = f", annotation {error.annotation['id']}" if error.annotation else ""
    return f"{number}, {[round(value, 1) for value in error.box]}"


def write_proposals(path: Path, data: dict[str, Any], errors: Sequence[LabelError]) -> None:
    """Write the proposals as annotations in COCO format, for an annotation tool.

    Each has the box and the class that it proposes and, beside COCO's keys, `kind`, `score`, `rank` within its kind,
    and `annotation_id` of the doubted annotation (null for a missing one). Images without proposals are left out; those
    with the likeliest come first.

    Raises:
        UserError: the file can't be written.
    """
    ranks: dict[str, int] = defaultdict(int)
    annotations = []
    for number, error in enumerate(errors, 1):
        ranks[error.kind] += 1
        box = [round(float(value), 2) for value in error.box]
        annotations.append(
            {
                "id": number,
                "image_id": error.image_id,
                "category_id": error.category_id,
                "bbox": box,
                "area": round(box[2] * box[3], 2),
                "iscrowd": 0,
                "kind": error.kind,
                "score": round(error.score, 4),
                "rank": ranks[error.kind],
                "annotation_id": error.annotation["id"] if error.annotation else None,
            }
        )
    entries = {image["id"]: image for image in data["images"]}
    images = [entries[number] for number in dict.fromkeys(error.image_id for error in errors)]
    content = {"images": images, "annotations": annotations, "categories": data["categories"]}
    write_whole(path, lambda part: part.write_text(json.dumps(content), encoding="utf-8"))
