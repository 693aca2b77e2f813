"""Boxes around the outlines and masks that COCO's format keeps under `segmentation`."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np

_LARGEST = 2**31  # pixels of a mask


def box_around(segmentation: Any) -> list[float] | None:
    """The box around an outline, xywh in pixels; None where the outline is absent, empty or broken.

    Args:
        segmentation: polygons [[x, y, x, y, …], …], or a run-length encoding {"counts": …, "size": [height, width]}
            whose counts are whole numbers, or COCO's text of them.
    """
    if isinstance(segmentation, list):
        return _around_polygons(segmentation)
    if isinstance(segmentation, dict):
        return _around_runs(segmentation)
    return None


def _around_polygons(polygons: list) -> list[float] | None:
    """As `box_around`; a single polygon may stand without the outer list."""
    if polygons and not any(isinstance(polygon, list) for polygon in polygons):
        polygons = [polygons]
    if not all(map(_is_even, polygons)):
        return None
    numbers = list(chain(*polygons))
    if not numbers or not all(map(_is_finite, numbers)):
        return None
    x0, y0, x1, y1 = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    return [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None


def _is_even(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) % 2 == 0


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _around_runs(mask: dict) -> list[float] | None:
    """As `box_around`. Runs go down the columns and alternate between outside and inside."""
    size, counts = mask.get("size"), mask.get("counts")
    if not _are_whole(size) or len(size) != 2 or min(size) == 0:
        return None
    height, width = size
    runs = _decode(counts) if isinstance(counts, str) else counts
    if not _are_whole(runs) or height * width > _LARGEST or sum(runs) != height * width:
        return None
    ends = np.cumsum(np.array(runs, dtype=np.int64))
    starts, ends = ends[0::2][: len(ends[1::2])], ends[1::2]  # of the runs inside
    starts, lasts = starts[ends > starts], ends[ends > starts] - 1
    if not len(starts):
        return None
    columns = starts // height, lasts // height
    whole = columns[1] > columns[0]  # such a run touches the lower border and the upper one
    top = np.where(whole, 0, starts % height).min()
    bottom = np.where(whole, height - 1, lasts % height).max()
    left, right = columns[0].min(), columns[1].max()
    return [int(left), int(top), int(right - left) + 1, int(bottom - top) + 1]


def _are_whole(value: Any) -> bool:
    """Whether a value from a file is a list of whole numbers from 0 to `_LARGEST`."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in value)


def _decode(text: str) -> list[int] | None:
    """COCO's text of run lengths -> the lengths; None if the text is broken.

    A character holds five bits of a number, the lowest first, and whether more follow; from the fourth number on, the
    text holds differences to the number before the last.
    """
    values = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not values.size or values.min() < 0 or values.max() > 63 or values[-1] & 32:
        return None
    runs: list[int] = []
    value = shift = 0
    for bits in values.tolist():
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 40:
                return None
            continue
        if bits & 16:  # a negative number
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs
