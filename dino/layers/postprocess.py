"""From the last layer's predictions to detections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.structures import Detections, at_most
from dino.utils.device import to_device

from .boxes import cxcywh_to_xyxy, to_float32


def detections(
    logits: Tensor, boxes: Tensor, sizes: Tensor | Sequence[int] | Sequence[Sequence[int]], max_detections: int
) -> Detections:
    """Choose the best (query, class) pairs; a box can appear with two labels. No threshold, no NMS, no clipping.

    Args:
        logits: (..., Q, C), of one image or of a batch.
        boxes: (..., Q, 4) cxcywh in [0, 1].
        sizes: (..., 2), height and width in pixels of the unpadded image that the boxes refer to.
        max_detections: K; less where there are fewer pairs.

    Returns:
        Detections with the leading dimensions in front.
    """
    scores = to_float32(logits).sigmoid().flatten(-2)  # (..., Q*C)
    scores, pair = scores.topk(at_most(max_detections, scores.shape[-1]))  # (..., K)
    query = torch.div(pair, logits.shape[-1], rounding_mode="floor")
    corners = cxcywh_to_xyxy(to_float32(boxes).gather(-2, query[..., None].expand(*query.shape, 4)))  # (..., K, 4)
    width_height = to_device(sizes, boxes.device).flip(-1).to(corners.dtype)  # (..., 2)
    return Detections(corners * torch.cat([width_height] * 2, -1)[..., None, :], scores, pair % logits.shape[-1])


def one_label_detections(
    logits: Tensor, boxes: Tensor, sizes: Tensor | Sequence[int] | Sequence[Sequence[int]], max_detections: int
) -> Detections:
    """As `detections`, but every query counts with its best class alone, so that no box appears twice."""
    best = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()  # (..., Q, C)
    logits = to_float32(logits).masked_fill(~best, -math.inf)
    return detections(logits, boxes, sizes, at_most(max_detections, logits.shape[-2]))
