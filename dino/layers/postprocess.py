"""From the last layer's predictions to the detections of one image."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import cxcywh_to_xyxy, widened


class Detections(NamedTuple):
    """K detections of one image, best first."""

    boxes: Tensor  # (K, 4) float32, xyxy in pixels
    scores: Tensor  # (K,) float32 in [0, 1]
    labels: Tensor  # (K,) int64


def detections(logits: Tensor, boxes: Tensor, image_size: tuple[int, int], max_detections: int) -> Detections:
    """The best (query, class) pairs; a box can appear with two labels. No threshold, no suppression, no clipping.

    Args:
        logits: (Q, C) of one image. boxes: (Q, 4) cxcywh in [0, 1].
        image_size: height and width in pixels of the unpadded image that the boxes shall refer to.
        max_detections: K; less where there are fewer pairs.
    """
    scores = widened(logits).sigmoid().flatten()  # (Q*C,)
    scores, pair = scores.topk(min(max_detections, len(scores)))
    query = torch.div(pair, logits.shape[1], rounding_mode="floor")
    height, width = image_size
    boxes = cxcywh_to_xyxy(widened(boxes)[query])
    return Detections(boxes * boxes.new_tensor([width, height, width, height]), scores, pair % logits.shape[1])


def one_label_detections(logits: Tensor, boxes: Tensor, image_size: tuple[int, int], max_detections: int) -> Detections:
    """As `detections`, but every query counts with its best class alone, so that no box appears twice."""
    best = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()  # (Q, C)
    logits = widened(logits).masked_fill(~best, -math.inf)
    return detections(logits, boxes, image_size, min(max_detections, len(logits)))
