"""Test-time augmentation (TTA): views of an image, and their detections joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino.data.images import resize_tensor
from dino.layers import Detections
from dino.modeling.detector import resized_size

from .tiling import suppress, take


class Augmentation(NamedTuple):
    """How a view is made of an image."""

    size: tuple[int, int]  # height and width in pixels
    mirrored: bool


def views(
    height: int, width: int, short_sides: Sequence[int], max_size: int, flips: Sequence[bool]
) -> list[Augmentation]:
    """Views of an image: each short side with each flip.

    Args:
        height, width: of the image in pixels.
        short_sides, max_size: of the views in pixels, see `resized_size`.
        flips: (False,) for plain views; with True among them, mirrored views besides.
    """
    sizes = [resized_size(height, width, short_side, max_size) for short_side in short_sides]
    both = (False, True) if True in flips else (False,)
    return [Augmentation(size, mirrored) for size in sizes for mirrored in both]


def make_view(image: Tensor, view: Augmentation) -> Tensor:
    """Image (3, H, W), values 0 to 255 -> view (3, h, w)."""
    if image.shape[1:] != view.size:
        image = resize_tensor(image, view.size)
    return image.flip(-1) if view.mirrored else image


def join(
    found: Sequence[Detections], chosen: Sequence[Augmentation], width: float, overlap: float, max_detections: int
) -> Detections:
    """Detections of all views of an image as one result, best first.

    Args:
        found: for each view, boxes in pixels of the original picture, mirrored where the view is.
        chosen: the views.
        width: of the picture in pixels.
        overlap: of detections of one class that overlap by more than this IoU, the best one stays.
        max_detections: most detections of the result.
    """
    upright = [_mirror(d, width) if view.mirrored else d for d, view in zip(found, chosen, strict=True)]
    joined = Detections(*(torch.cat(values) for values in zip(*upright, strict=True)))
    return take(suppress(joined, overlap), slice(max_detections))


def _mirror(found: Detections, width: float) -> Detections:
    """Detections of a picture of this width -> those of the mirrored picture."""
    x0, y0, x1, y1 = found.boxes.unbind(-1)
    return found._replace(boxes=torch.stack([width - x1, y0, width - x0, y1], -1))
