"""Tiles of large pictures, and detections of several views of a picture merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dino.layers import Detections

_BORDER = 0.01  # of a view's side: a box that ends so close to a cut belongs to an object that is cut


class View(NamedTuple):
    """A rectangle of a picture, in whole pixels."""

    x0: int
    y0: int
    x1: int
    y1: int


def views(height: int, width: int, tile: int, overlap: float) -> list[View]:
    """List the whole picture, then, unless one would cover it, tiles of equal size that cover it, row by row.

    Args:
        height, width: of the picture in pixels.
        tile: side of a tile in pixels.
        overlap: of neighbouring tiles, at least, as a fraction of a tile in [0, 1).
    """
    whole = View(0, 0, width, height)
    if max(height, width) <= tile:
        return [whole]
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    return [whole, *(View(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns)]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixels of tiles along a side of `length` pixels: evenly spaced, from one end to the other."""
    rest = max(length - tile, 0)
    steps = math.ceil(rest / max(tile * (1 - overlap), 1))
    return [round(rest * step / steps) for step in range(steps + 1)] if steps else [0]


def merge(found: Sequence[Detections], cuts: Sequence[View], image_size: tuple[int, int], iou: float) -> Detections:
    """Merge detections of several views of one picture into one result in pixels of the picture, best first.

    Boxes that end at a cut are dropped: the object is whole in an overlapping neighbour, or in the view of the whole
    picture. Of boxes of one class that overlap by more than `iou`, the best one stays.

    Args:
        found: for each view, in its own pixels.
        cuts: the views, as from `views`.
        image_size: height and width of the picture.
        iou: in [0, 1].
    """
    uncut = [take(d, ~_is_cut(d.boxes, view, image_size)) for d, view in zip(found, cuts, strict=True)]
    shifts = [d.boxes.new_tensor([v.x0, v.y0, v.x0, v.y0]) for d, v in zip(uncut, cuts, strict=True)]
    boxes = torch.cat([d.boxes + shift for d, shift in zip(uncut, shifts, strict=True)])
    joined = Detections(boxes, torch.cat([d.scores for d in uncut]), torch.cat([d.labels for d in uncut]))
    return suppress(joined, iou)


def _is_cut(boxes: Tensor, view: View, image_size: tuple[int, int]) -> Tensor:
    """(K,) bool: which boxes (K, 4), in pixels of the view, touch a side of it that lies inside the picture."""
    height, width = view.y1 - view.y0, view.x1 - view.x0
    margin = boxes.new_tensor([width, height]) * _BORDER
    low = (boxes[:, :2] < margin) & boxes.new_tensor([view.x0 > 0, view.y0 > 0]).bool()
    inside = boxes.new_tensor([view.x1 < image_size[1], view.y1 < image_size[0]]).bool()
    high = (boxes[:, 2:] > boxes.new_tensor([width, height]) - margin) & inside
    return (low | high).any(1)


def suppress(found: Detections, iou: float) -> Detections:
    """Of detections of one class that overlap by more than `iou`, keep the best; best first."""
    return take(found, batched_nms(found.boxes, found.scores, found.labels, iou))


def take(found: Detections, which: Tensor | slice) -> Detections:
    """Select detections by mask, index or slice."""
    return Detections(*(values[which] for values in found))


def scale(found: Detections, size: Sequence[int], new_size: Sequence[int]) -> Detections:
    """Detections in pixels of a picture of `size` (height, width) -> in pixels of the same picture at `new_size`."""
    x, y = new_size[1] / size[1], new_size[0] / size[0]
    return found._replace(boxes=found.boxes * found.boxes.new_tensor([x, y, x, y]))


def clip(found: Detections, size: Sequence[int]) -> Detections:
    """Clip boxes to their picture of `size` (height, width) in pixels: as many detections, some may be empty then."""
    height, width = size
    x, y = found.boxes[:, 0::2].clamp(min=0).clamp(max=width), found.boxes[:, 1::2].clamp(min=0).clamp(max=height)
    return found._replace(boxes=torch.stack([x, y], -1).flatten(1))


def nonempty(found: Detections) -> Tensor:
    """(K,) bool: which boxes have a positive width and height."""
    return (found.boxes[:, 2:] > found.boxes[:, :2]).all(-1)
