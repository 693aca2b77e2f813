"""Objects of each class, and their sizes after resizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .annotations import Contents, Object
from .issues import Issue

TINY = 8.0  # pixels after resizing: the stride of the finest feature map of the 4-scale models


class Resize(NamedTuple):
    """The rule of the recipes: the short side becomes `size`, unless the long side would exceed `max_size` (pixels)."""

    size: int = 800
    max_size: int = 1333

    def factor(self, image: dict) -> float:
        """Factor by which the sides of an image grow."""
        sides = image["width"], image["height"]
        return min(self.size / min(sides), self.max_size / max(sides))


def histogram(contents: Contents) -> dict[str, int]:
    """Number of objects of each class, the most frequent first."""
    counts = Counter(o.entry["category_id"] for o in contents.objects)
    names = {number: entry["name"] for number, entry in contents.categories.items()}
    return {names[n]: counts[n] for n in sorted(names, key=lambda n: -counts[n])}


def resized(objects: list[Object], resize: Resize) -> np.ndarray:
    """(len(objects),) float64: root of each box's area in pixels after resizing; 0 for boxes without area."""
    areas = np.array([max(o.box[2], 0) * max(o.box[3], 0) for o in objects], dtype=np.float64)
    return np.sqrt(areas) * np.array([resize.factor(o.image) for o in objects], dtype=np.float64)


def check_sizes(objects: list[Object], sizes: np.ndarray) -> Iterator[Issue]:
    """Objects smaller than a cell of the finest feature map."""
    for index in np.flatnonzero((sizes > 0) & (sizes < TINY)):
        o = objects[index]
        text = f"{o.where}: {o.box} is {sizes[index]:.1f} pixels large after resizing"
        yield Issue("tiny", "annotations", o.index, text)
