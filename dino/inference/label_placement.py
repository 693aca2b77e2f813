"""Places for the labels of boxes: inside the picture, and none above another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ImageFont

from .fonts import legible, load_font

_MOST_COVERED = 0.25  # of the picture, by labels; more would hide it
_SIZES = (1.0, 0.75)  # of the font, tried in this order
_WIDEST = 0.6  # of the picture's width, for one label
_LEAST_FONT, _LEAST_COLUMNS, _MOST_COLUMNS = 9, 4, 36

Rectangle = tuple[float, float, float, float]  # xyxy in pixels


class Plate(NamedTuple):
    """A label at its place.

    Args:
        index: of its box.
        place: the ground of the text.
        anchor: where the text starts, in pixels.
    """

    index: int
    place: Rectangle
    text: str
    font: ImageFont.FreeTypeFont
    anchor: tuple[float, float]


def place_labels(
    size: tuple[int, int], boxes: Sequence[Rectangle | None], texts: Sequence[str], font_size: int
) -> tuple[list[Plate], Plate | None]:
    """Places for the labels of boxes, the first ones choosing first.

    A label without a free place at its box, also with a smaller font, is left out.

    Args:
        size: of the picture: width, height in pixels.
        boxes: inside the picture; None for one without a label.
        font_size: in pixels.

    Returns:
        the plates, and a note of how many labels are left out (index -1) or None.
    """
    plates = _place(size, boxes, texts, font_size, None)
    left_out = sum(box is not None for box in boxes) - len(plates)
    if not left_out:
        return plates, None
    note = _note(size, left_out, font_size)
    plates = _place(size, boxes, texts, font_size, note)
    return plates, note and _note(size, sum(box is not None for box in boxes) - len(plates), font_size)


def _place(
    size: tuple[int, int],
    boxes: Sequence[Rectangle | None],
    texts: Sequence[str],
    font_size: int,
    note: Plate | None,
) -> list[Plate]:
    """The plates that find a place beside each other and the note."""
    plates: list[Plate] = []
    taken = np.array([note.place] if note else []).reshape(-1, 4)  # (N, 4)
    for index, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        plate = None if box is None or _is_full(taken, size) else _find_place(index, box, text, font_size, size, taken)
        if plate:
            plates.append(plate)
            taken = np.vstack([taken, plate.place])
    return plates


def _is_full(taken: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether more labels, beside the first three, would hide the picture."""
    covered = ((taken[:, 2] - taken[:, 0]) * (taken[:, 3] - taken[:, 1])).sum()
    return len(taken) > 3 and covered > _MOST_COVERED * size[0] * size[1]


def _find_place(
    index: int, box: Rectangle, text: str, font_size: int, size: tuple[int, int], taken: np.ndarray
) -> Plate | None:
    """The first free place, with the largest font."""
    for scale in _SIZES:
        plate = _shape(index, text, max(_LEAST_FONT, round(scale * font_size)), size)
        if plate is None:
            continue
        _, _, width, height = plate.place
        for x, y in _corners(box, width, height, size):
            if _is_free((x, y, x + width, y + height), size, taken):
                return _moved(plate, x, y)
    return None


@lru_cache(maxsize=4096)
def _shape(index: int, text: str, font_size: int, size: tuple[int, int]) -> Plate | None:
    """A plate at (0, 0) whose text is shortened until it fits; None where nothing fits."""
    pad = max(2, round(font_size / 5))
    text = legible(text)
    widest = max(_WIDEST * size[0], min(size[0], 12 * font_size)) - 2 * pad
    limit = min(len(text), _MOST_COLUMNS)
    while limit >= min(_LEAST_COLUMNS, len(text)):
        line = legible(text, max(limit, 3))
        font = load_font(line, font_size)
        left, top, _, bottom = font.getbbox(line + "Åg", anchor="ls")
        length, height = font.getlength(line), bottom - top + pad
        if height > size[1]:
            return None
        if length <= widest:
            place = (0, 0, int(np.ceil(length)) + 2 * pad, int(np.ceil(height)))
            return Plate(index, place, line, font, (pad - min(left, 0), pad / 2 - top))
        limit = min(limit - 1, int(limit * max(widest, 0) / length) + 1)
    return None


def _corners(box: Rectangle, width: float, height: float, size: tuple[int, int]) -> Iterator[tuple[float, float]]:
    """Upper left corners of a plate at a box, the best first."""
    x0, y0, x1, y1 = box
    inside = [(x0, y0), (x0, y1 - height), (x1 - width, y0), (x1 - width, y1 - height)]
    roomy = y1 - y0 >= 4 * height and x1 - x0 >= width
    yield x0, y0 - height
    yield from inside[: 4 if roomy else 0]
    yield x0, y1
    yield x1 - width, y0 - height
    yield x1 - width, y1
    yield x1, y0
    yield x0 - width, y0
    yield x1, y1 - height
    yield x0 - width, y1 - height
    for x, y in ((x0, y0 - height), (x0, y1), *inside):  # moved into the picture
        yield max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))


def _is_free(place: Rectangle, size: tuple[int, int], taken: np.ndarray) -> bool:
    """Whether a rectangle lies in the picture and on no other."""
    x0, y0, x1, y1 = place
    if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
        return False
    beside = (taken[:, 2] <= x0) | (taken[:, 0] >= x1) | (taken[:, 3] <= y0) | (taken[:, 1] >= y1)
    return bool(beside.all())


def _note(size: tuple[int, int], left_out: int, font_size: int) -> Plate | None:
    """How many labels are left out, in the lower right corner; None where that does not fit either."""
    for text in (f"{left_out:,} more without label", f"+{left_out:,}"):
        plate = _shape(-1, text, font_size, size)
        if plate and plate.text == text:
            width, height = plate.place[2:]
            return _moved(plate, size[0] - width, size[1] - height)
    return None


def _moved(plate: Plate, x: float, y: float) -> Plate:
    """A plate that was shaped at (0, 0), with its corner at whole pixels near (x, y)."""
    x, y = int(x), int(y)
    _, _, width, height = plate.place
    return plate._replace(place=(x, y, x + width, y + height), anchor=(x + plate.anchor[0], y + plate.anchor[1]))
