"""Boxes as plain tensors: conversions, overlap, and the logit space in which anchors are refined."""

import torch
from torch import Tensor

INVERSE_SIGMOID_EPS = 1e-3  # caps references at 0.000999 .. 0.999001 of the image, as the published models were trained
IOU_EPS = 1e-6  # in units of the image's area: a perfect match of a 0.001 x 0.001 box reaches a GIoU of 0.5 only


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners, in the same unit."""
    center, size = boxes.split(2, -1)  # whose gradient is one operation; that of a slice is two
    return torch.cat([center - 0.5 * size, center + 0.5 * size], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre and size, in the same unit."""
    low, high = boxes.split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of `x` clamped to [0, 1], with numerator and denominator kept above 1e-3; any shape.

    The gradient is 0 outside [0, 1]; within 0.001 of a border only the unclamped one of the two logarithms passes any.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=INVERSE_SIGMOID_EPS) / (1 - x).clamp(min=INVERSE_SIGMOID_EPS))


def refine(boxes: Tensor, delta: Tensor) -> Tensor:
    """Move `boxes` (..., 4) in [0, 1] by `delta` (..., 4), a step in logit space; computed in float32 or wider."""
    return (inverse_sigmoid(boxes) + delta.to(boxes.dtype)).sigmoid()


def area(sides: Tensor) -> Tensor:
    """(..., 2) width and height -> (...). (The gradient of `prod` is a dozen operations.)"""
    width, height = sides.unbind(-1)
    return width * height


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of xyxy boxes that broadcast: (..., 4), (..., 4) -> (...).

    Both denominators carry the 1e-6 of the published program, for boxes in [0,1]. Degenerate boxes give finite values.
    """
    (low_a, high_a), (low_b, high_b) = a.split(2, -1), b.split(2, -1)  # (..., 2) each
    overlap = area((torch.min(high_a, high_b) - torch.max(low_a, low_b)).clamp(min=0))
    union = area(high_a - low_a) + area(high_b - low_b) - overlap
    hull = area((torch.max(high_a, high_b) - torch.min(low_a, low_b)).clamp(min=0))
    return overlap / (union + IOU_EPS) - (hull - union) / (hull + IOU_EPS)


def to_float32(x: Tensor) -> Tensor:
    """`x` in float32 or wider: box algebra, matching and losses never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
