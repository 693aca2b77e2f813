"""Which picture boxes were drawn on, where files have an EXIF orientation: decided over all images of a data set."""

from __future__ import annotations

from collections.abc import Sequence

from .notation import TOLERANCE

_CLEAR = 10  # times as many boxes must leave the picture that is refused
UPRIGHT, STORED = "upright", "stored"

# EXIF's number -> a stored point (x, y) of a picture (width, height) in the upright picture.
_TURNS = {
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}


def drawn_on(boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]) -> str | None:
    """UPRIGHT or STORED: the picture that the boxes fit; None if they fit both, or neither.

    Args:
        boxes: xywh in pixels, of all images whose orientation exchanges width and height.
        sizes: stored width and height of each box's image.
    """
    leaving = {STORED: 0, UPRIGHT: 0}
    for (x, y, w, h), (width, height) in zip(boxes, sizes, strict=True):
        negative = x < -TOLERANCE or y < -TOLERANCE
        leaving[STORED] += negative or x + w > width + TOLERANCE or y + h > height + TOLERANCE
        leaving[UPRIGHT] += negative or x + w > height + TOLERANCE or y + h > width + TOLERANCE
    if leaving[STORED] > leaving[UPRIGHT] * _CLEAR:
        return UPRIGHT
    return STORED if leaving[UPRIGHT] > leaving[STORED] * _CLEAR else None


def turn(box: Sequence[float], size: tuple[int, int], orientation: int) -> list[float]:
    """A box xywh of the stored picture -> xywh of the upright one, in pixels.

    Args:
        size: stored width and height.
        orientation: EXIF's number, 1 to 8.
    """
    x, y, w, h = box
    if orientation not in _TURNS:
        return [x, y, w, h]
    (ax, ay), (bx, by) = (_TURNS[orientation](*point, *size) for point in ((x, y), (x + w, y + h)))
    return [min(ax, bx), min(ay, by), w if orientation < 5 else h, h if orientation < 5 else w]
