"""Test-time augmentation (TTA): views of an image, and their detections joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dino.data.images import resize_tensor
from dino.layers import Detections
from dino.modeling.detector import resized_size


class Augmentation(NamedTuple):
    """How a view is made of an image."""

    size: tuple[int, int]  # height and width in pixels
    mirrored: bool


def views(
    height: int, width: int, short_sides: Sequence[int], max_size: int, flips: Sequence[bool]
) -> list[Augmentation]:
    """Views of an image: each short side with each flip; the first one is not mirrored.

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
    found: Sequence[Detections],
    chosen: Sequence[Augmentation],
    weights: Sequence[float],
    width: float,
    overlap: float,
) -> Detections:
    """Join the detections of all views of an image one to one, as appendix A of the paper does.

    The first view is the main one. A detection of the main view is matched with one detection of each other view: that
    of highest IoU, if the IoU exceeds `overlap`. Matched boxes are averaged, weighted by view weight times score. NMS
    over all views lowered the paper's AP.

    The paper leaves four questions open. The answers here:

    - Both detections of a match have the same class: a query may give one box two labels.
    - A detection is matched once at most. If several of the main view choose it, the one of highest IoU gets it, of
      equal ones the better. The others get no second choice and stay without a match in this view.
    - Scores and labels are those of the main view. Only boxes are averaged.
    - Detections of other views without a match are dropped: joining adds no duplicates.

    Args:
        found: for each view, best first, boxes in pixels of the original picture, mirrored where the view is.
        chosen: the views.
        weights: of the views, positive; only their ratios matter.
        width: of the picture in pixels.
        overlap: IoU in [0, 1].

    Returns:
        as many detections as the main view has, in their order.
    """
    main, *others = (_mirror(d, width) if view.mirrored else d for d, view in zip(found, chosen, strict=True))
    total = weights[0] * main.scores  # (N,) weights of the boxes averaged so far
    shift = torch.zeros_like(main.boxes)  # (N, 4) from the box of the main view, so that equal boxes stay exact
    for other, weight in zip(others, weights[1:], strict=True):
        if not (len(main.scores) and len(other.scores)):
            continue
        index, matched = _match(main, other, overlap)
        share = matched * weight * other.scores[index]  # (N,)
        shift += torch.where(matched[:, None], share[:, None] * (other.boxes[index] - main.boxes), 0)
        total = total + share
    total = total.clamp_min(torch.finfo(total.dtype).tiny)  # scores may be 0
    return main._replace(boxes=main.boxes + shift / total[:, None])


def _match(main: Detections, other: Detections, overlap: float) -> tuple[Tensor, Tensor]:
    """Match the N detections of the main view with those of another view, neither of them empty.

    Returns:
        index (N,) int64 into the other view; matched (N,) bool, False where the index means nothing.
    """
    iou = box_iou(main.boxes, other.boxes)  # (N, M), NaN between empty boxes
    iou = iou.where((iou > overlap) & (main.labels[:, None] == other.labels), 0)
    best, index = iou.max(1)  # (N,) both; the first of equal ones
    choices = torch.zeros_like(iou).scatter(1, index[:, None], best[:, None])  # (N, M), one IoU in each row
    winner = choices.argmax(0)  # (M,) into the main view
    rows = torch.arange(len(index), device=index.device)
    return index, (best > 0) & (winner[index] == rows)


def _mirror(found: Detections, width: float) -> Detections:
    """Detections of a picture of this width -> those of the mirrored picture."""
    x0, y0, x1, y1 = found.boxes.unbind(-1)
    return found._replace(boxes=torch.stack([width - x1, y0, width - x0, y1], -1))
