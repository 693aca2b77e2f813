"""Large pictures in tiles: where these lie, and how what was found in them becomes one result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dino.layers.postprocess import Detections

BORDER = 0.01  # of a view: boxes that come so close to a cut belong to an object that goes on behind it


class View(NamedTuple):
    """A rectangle of a picture, in whole pixels."""

    x0: int
    y0: int
    x1: int
    y1: int


def views(height: int, width: int, tile: int, overlap: float) -> list[View]:
    """The whole picture, then, unless one would cover it, tiles of equal size that cover it, row by row.

    Args:
        height, width: of the picture in pixels.
        tile: side of a tile in pixels.
        overlap: of neighbouring tiles, at least, as a fraction of a tile in [0, 1).
    """
    whole = View(0, 0, width, height)
    if max(height, width) <= tile:
        return [whole]
    rows, columns = starts(height, tile, overlap), starts(width, tile, overlap)
    return [whole, *(View(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns)]


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along a side of `length` pixels: evenly spaced, from one end to the other."""
    rest = max(length - tile, 0)
    steps = math.ceil(rest / max(tile * (1 - overlap), 1))
    return [round(rest * step / steps) for step in range(steps + 1)] if steps else [0]


def merge(found: Sequence[Detections], places: Sequence[View], image_size: tuple[int, int], iou: float) -> Detections:
    """What was found in several views of one picture as one result in pixels of the picture, best first.

    Boxes that end where their view was cut are left out: the object is whole in a neighbour that overlaps, or in the
    view of the whole picture. Of boxes of one class that overlap by more than `iou`, the best one stays.

    Args:
        found: for each view, in its own pixels.
        places: the views, as from `views`.
        image_size: height and width of the picture.
        iou: in [0, 1].
    """
    uncut = [take(d, ~is_cut(d.boxes, place, image_size)) for d, place in zip(found, places, strict=True)]
    shifts = [d.boxes.new_tensor([v.x0, v.y0, v.x0, v.y0]) for d, v in zip(uncut, places, strict=True)]
    boxes = torch.cat([d.boxes + shift for d, shift in zip(uncut, shifts, strict=True)])
    joined = Detections(boxes, torch.cat([d.scores for d in uncut]), torch.cat([d.labels for d in uncut]))
    return suppress(joined, iou)


def is_cut(boxes: Tensor, view: View, image_size: tuple[int, int]) -> Tensor:
    """(K,) bool: which boxes (K, 4), in pixels of the view, touch a side of it that lies inside the picture."""
    height, width = view.y1 - view.y0, view.x1 - view.x0
    margin = boxes.new_tensor([width, height]) * BORDER
    low = (boxes[:, :2] < margin) & boxes.new_tensor([view.x0 > 0, view.y0 > 0]).bool()
    inside = boxes.new_tensor([view.x1 < image_size[1], view.y1 < image_size[0]]).bool()
    high = (boxes[:, 2:] > boxes.new_tensor([width, height]) - margin) & inside
    return (low | high).any(1)


def suppress(found: Detections, iou: float) -> Detections:
    """Of detections of one class that overlap by more than `iou`, keep the best; best first."""
    return take(found, batched_nms(found.boxes, found.scores, found.labels, iou))


def take(found: Detections, which: Tensor) -> Detections:
    """Some of the detections, by mask or by index."""
    return Detections(*(values[which] for values in found))
