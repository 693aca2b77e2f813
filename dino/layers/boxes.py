"""Boxes as plain tensors: conversions, overlap, and the logit space in which anchors are refined."""

import torch
from torch import Tensor

_INVERSE_SIGMOID_EPS = 1e-3  # clamps references to 0.000999 .. 0.999001 of the image, as in the published models
_IOU_EPS = 1e-6  # in units of the image's area: a perfect match of a 0.001 x 0.001 box has a GIoU of only 0.5


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners, in the same unit."""
    center, size = boxes.split(2, -1)  # one operation in the backward pass; slices are two
    return torch.cat([center - 0.5 * size, center + 0.5 * size], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre and size, in the same unit."""
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of `x` clamped to [0, 1], with numerator and denominator at least 1e-3; any shape.

    The gradient is 0 outside [0, 1]; within 0.001 of a border, one of the two logarithms is clamped and has none.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=_INVERSE_SIGMOID_EPS) / (1 - x).clamp(min=_INVERSE_SIGMOID_EPS))


def refine(boxes: Tensor, delta: Tensor) -> Tensor:
    """Move `boxes` (..., 4) in [0, 1] by `delta` (..., 4), a step in logit space; computed in float32 or wider."""
    return (inverse_sigmoid(boxes) + delta.to(boxes.dtype)).sigmoid()


def _area(sides: Tensor) -> Tensor:
    """(..., 2) width and height -> (...). (`prod` takes a dozen operations in the backward pass.)"""
    width, height = sides.unbind(-1)
    return width * height


def _corners(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upper left and lower right (..., 2) of a, then of b: xyxy boxes (..., 4) that broadcast."""
    return (*a.split(2, -1), *b.split(2, -1))


def _overlap_and_union(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) of boxes by their corners (..., 2)."""
    overlap = _area((torch.min(high_a, high_b) - torch.max(low_a, low_b)).clamp(min=0))
    return overlap, _area(high_a - low_a) + _area(high_b - low_b) - overlap


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of xyxy boxes that broadcast: (..., 4), (..., 4) -> (...). 0 where both are empty."""
    overlap, union = _overlap_and_union(*_corners(a, b))
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of xyxy boxes that broadcast: (..., 4), (..., 4) -> (...).

    Both denominators have the 1e-6 of the official program, for boxes in [0,1]. Degenerate boxes give finite values.
    """
    low_a, high_a, low_b, high_b = corners = _corners(a, b)
    overlap, union = _overlap_and_union(*corners)
    hull = _area((torch.max(high_a, high_b) - torch.min(low_a, low_b)).clamp(min=0))
    return overlap / (union + _IOU_EPS) - (hull - union) / (hull + _IOU_EPS)


def to_float32(x: Tensor) -> Tensor:
    """`x` in float32 or float64: box algebra, matching and losses never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
