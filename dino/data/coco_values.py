"""Values that annotation tools write in other forms than COCO's, converted where nothing has to be guessed.

Numbers as text, whole numbers with a decimal point, `iscrowd` and `area` that are null, boxes that only an outline
states. Training, evaluation and `dino check` all read a file through `to_plain`. What it can't convert stays as it is,
for the checks that follow.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from .outlines import box_around

LARGEST_AREA = 1e10  # square pixels; COCO's evaluation ignores objects beyond

_WHOLE = re.compile(r"\s*[+-]?\d{1,18}(\.0*)?\s*")
_NUMBER = re.compile(r"\s*[+-]?(\d{1,300}\.?\d{0,300}|\.\d{1,300})([eE][+-]?\d{1,3})?\s*")
_TRUTHS = {None: 0, "": 0, "0": 0, "1": 1, "false": 0, "true": 1}  # of `iscrowd`, in small letters
_NUMBERS = {int, float}
_IDS = ("id", "image_id", "category_id")


class Issue(NamedTuple):
    """An issue of one entry; here, a converted value.

    Args:
        kind: key of `dino.data.check.KINDS`.
        part: list of the file: "images", "annotations" or "categories".
        index: of the entry in that list.
        text: one line about it.
    """

    kind: str
    part: str
    index: int
    text: str


def to_plain(data: dict[str, Any]) -> tuple[dict[str, Any], list[Issue]]:
    """Convert the values of parsed annotations. The given ones stay as they are; sound entries are not copied.

    Args:
        data: lists under "images", "annotations" and "categories".
    """
    changes: list[Issue] = []
    parts = {}
    for part, convert in (("images", _plain_image), ("annotations", _plain_annotation), ("categories", _plain_ids)):
        parts[part] = [
            entry if not isinstance(entry, dict) else convert(entry, part, index, changes)
            for index, entry in enumerate(data[part])
        ]
    return {**data, **parts}, changes


def crowds_as_objects(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of plain annotations whose crowd regions are objects: some annotation tools mark every mask as a crowd."""
    entries = [{**a, "iscrowd": 0} if isinstance(a, dict) and a.get("iscrowd") else a for a in data["annotations"]]
    return {**data, "annotations": entries}


def _to_whole(value: Any) -> int | None:
    """A whole number, also as text or with a decimal point -> int; None for anything else."""
    if type(value) is int:
        return value
    if type(value) is float:
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    return int(value.strip().partition(".")[0]) if isinstance(value, str) and _WHOLE.fullmatch(value) else None


def _to_number(value: Any) -> float | int | None:
    """A number, also as text -> a number, which may be infinite or NaN; None for anything else."""
    if type(value) in (int, float):
        return value
    whole = _to_whole(value)
    if whole is not None:
        return whole
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else None


def to_crowd(value: Any) -> int | None:
    """`iscrowd` of a file -> 0 or 1; None for what is no yes or no."""
    if isinstance(value, str):
        value = value.strip().lower()
    if value is None or isinstance(value, str):
        return _TRUTHS.get(value)
    return int(value) if type(value) in (int, bool, float) and value in (0, 1) else None


def is_box(value: Any) -> bool:
    """Whether a value from a file is a list of four numbers, finite or not."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that fits a float (whole numbers in JSON have any length)."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def is_area(value: Any) -> bool:
    """Whether a value from a file is an area that COCO's evaluation can use."""
    return type(value) in (int, float) and 0 <= value <= LARGEST_AREA


def short(value: Any) -> str:
    """A value of the file as JSON of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, list | dict) else json.dumps(value)[:70]
    return text if len(text) <= 60 else text[:57] + "…"


def _plain_ids(entry: dict, part: str, index: int, changes: list[Issue], keys: tuple = ("id",)) -> dict:
    """An entry whose ids, or other whole numbers, are written as such."""
    values = {}
    for key in keys:
        value = entry.get(key)
        if value is not None and type(value) is not int:
            number = _to_whole(value)
            if number is not None:
                values[key] = number
                changes.append(Issue("number", part, index, f"{_name(entry, part)}: {key} {short(value)}"))
    return {**entry, **values} if values else entry


def _plain_image(entry: dict, part: str, index: int, changes: list[Issue]) -> dict:
    """An image with whole numbers as its id and size."""
    return _plain_ids(entry, part, index, changes, ("id", "width", "height"))


def _plain_annotation(entry: dict, part: str, index: int, changes: list[Issue]) -> dict:
    """An annotation with whole ids, a box of numbers, an `iscrowd` of 0 or 1 and an area."""
    if _is_plain(entry):
        return entry
    entry = _plain_ids(entry, part, index, changes, _IDS)
    values = {}
    box, change = _plain_box(entry)
    if change:
        values["bbox"] = box
        changes.append(Issue(change, part, index, f"{_name(entry, part)}: bbox {short(entry.get('bbox'))}"))
    for key, convert, types in (
        ("iscrowd", to_crowd, (int,)),
        ("area", lambda value: _plain_area(value, box), (int, float)),
    ):
        if key in entry and type(entry[key]) not in types:
            value = convert(entry[key])
            if value is not None:
                values[key] = value
            if value is not None and entry[key] is not None:
                text = f"{_name(entry, part)}: {key} {short(entry[key])}"
                changes.append(Issue("number", part, index, text))
    return {**entry, **values} if values else entry


def _is_plain(a: dict) -> bool:
    """Whether an annotation, as most are, needs no conversion; written for files of millions."""
    box = a.get("bbox")
    if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
        return False
    return (
        type(a.get("id")) is type(a.get("image_id")) is type(a.get("category_id")) is int
        and (not a.get("segmentation") or (box[2] > 0 and box[3] > 0))
        and type(a.get("iscrowd", 0)) is int
        and type(a.get("area", 0)) in _NUMBERS
    )


def _plain_box(entry: dict) -> tuple[Any, str]:
    """The box of an annotation, and the kind of its change; an empty text if there is none.

    A box that is absent, or without area, follows from the outline.
    """
    box = entry.get("bbox")
    if box in (None, []) or _is_empty(box):
        found = box_around(entry.get("segmentation"))
        if found is not None:
            return found, "outline"
    if isinstance(box, list) and len(box) == 4 and any(isinstance(n, str) for n in box):
        numbers = [_to_number(n) for n in box]
        if None not in numbers:
            return numbers, "number"
    return box, ""


def _is_empty(box: Any) -> bool:
    """Whether a value is a box of numbers without area."""
    return is_box(box) and (box[2] <= 0 or box[3] <= 0)


def _plain_area(value: Any, box: Any) -> float | None:
    """An area that is text, or null, as a number."""
    if isinstance(value, str):
        number = _to_number(value)
    elif value is None and is_box(box):
        number = area_of(box)
    else:
        return None
    return number if is_area(number) else None


def area_of(box: list[float]) -> float:
    """Area of an xywh box; 0 without a positive width and height."""
    return max(box[2], 0) * max(box[3], 0)


def _name(entry: dict, part: str) -> str:
    """What a message calls an entry."""
    one = {"images": "image", "annotations": "annotation", "categories": "category"}[part]
    return f"{one} {short(entry.get('id'))}"
