"""How the four numbers of a file's boxes are meant: decided by how many boxes leave their image in each reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

TOLERANCE = 1.0  # pixels beyond the border that come from rounding
_FEWEST = 8  # boxes from which the notation of a whole file is inferred
_FRACTION = 0.002  # of an image's side: as TOLERANCE, for boxes in fractions
_CLEAR = 10  # times as many boxes must leave their image in the reading that is refused
_SHARE = 0.05  # of the boxes, at least, leave their image if it is the whole file that is meant otherwise
_REACH = 0.05  # of its size: how far a typical box of these leaves its image; sloppy boxes stay closer

# Kind of issue -> the reading, and whether the numbers are fractions of the image.
NOTATIONS = {
    "xyxy": ("corners", False),
    "centres": ("centre", False),
    "fractions": ("xywh", True),
    "fraction_corners": ("corners", True),
    "fraction_centres": ("centre", True),
}
UNCLEAR = "unclear"


def _from_xywh(x: float, y: float, w: float, h: float) -> tuple:
    return x, y, x + w, y + h


def _from_corners(*corners: float) -> tuple:
    return corners


def _from_centre(x: float, y: float, w: float, h: float) -> tuple:
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


_READINGS: dict[str, Callable[..., tuple]] = {"xywh": _from_xywh, "corners": _from_corners, "centre": _from_centre}


def to_xywh(box: Sequence[float], notation: str, width: int, height: int) -> list[float]:
    """A box of a notation -> xywh in pixels.

    Args:
        notation: key of NOTATIONS.
        width, height: of the image in pixels.
    """
    reading, fractions = NOTATIONS[notation]
    x0, y0, x1, y1 = _READINGS[reading](*box)
    x, y = (width, height) if fractions else (1, 1)
    return [x0 * x, y0 * y, (x1 - x0) * x, (y1 - y0) * y]


def infer_notation(boxes: np.ndarray, sizes: np.ndarray) -> str:
    """The notation of a whole file: a key of NOTATIONS, UNCLEAR, or an empty text for xywh in pixels.

    Args:
        boxes: (N, 4) float64, as in the file.
        sizes: (N, 2) float64, width and height of each box's image in pixels.
    """
    if len(boxes) < _FEWEST:
        return ""
    if boxes.min() >= -0.001 and boxes.max() <= 1.001:
        return _infer_fractions(boxes)
    leaving = {name: _leaving(boxes, name, sizes, TOLERANCE) for name in _READINGS}
    if not leaving["corners"].any() and leaving["xywh"].any():
        return "xyxy"
    plain, by_centre = leaving["xywh"].sum(), leaving["centre"].sum()
    many = plain >= max(_SHARE * len(boxes), 5)
    if many and by_centre * _CLEAR <= plain and _reach(boxes, sizes, leaving["xywh"]) >= _REACH:
        return "centres"
    return ""


def _infer_fractions(boxes: np.ndarray) -> str:
    """As `infer_notation`, for numbers in [0, 1]: the reading in which by far the fewest boxes leave their image."""
    counts = {name: _leaving(boxes, name, np.ones((len(boxes), 2)), _FRACTION).sum() for name in _READINGS}
    best, second = sorted(counts, key=counts.__getitem__)[:2]
    if counts[second] < max(counts[best] * _CLEAR, 2):
        return UNCLEAR
    return next(name for name, meant in NOTATIONS.items() if meant == (best, True))


def _leaving(boxes: np.ndarray, reading: str, sizes: np.ndarray, tolerance: float) -> np.ndarray:
    """(N,) bool: which boxes, in a reading, have no area or leave their image."""
    x0, y0, x1, y1 = _READINGS[reading](*boxes.T)
    width, height = sizes.T
    outside = (x0 < -tolerance) | (y0 < -tolerance) | (x1 > width + tolerance) | (y1 > height + tolerance)
    return outside | (x1 <= x0) | (y1 <= y0)


def _reach(boxes: np.ndarray, sizes: np.ndarray, which: np.ndarray) -> float:
    """Median of how far some boxes, xywh, leave their image, as a fraction of their size."""
    x, y, w, h = boxes[which].T
    width, height = sizes[which].T
    with np.errstate(all="ignore"):
        return float(np.nanmedian(np.maximum((x + w - width) / w, (y + h - height) / h)))
