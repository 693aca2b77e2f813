"""Turns the last layer's predictions into detections."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.structures import Detections, at_most
from dino.utils.device import to_device

from .boxes import cxcywh_to_xyxy, to_float32


def detections(logits: Tensor, boxes: Tensor, image_size: tuple[int, int], max_detections: int) -> Detections:
    """Select the best (query, class) pairs of one image. No threshold, no suppression, no clipping.

    A box can appear with two labels.

    Args:
        logits: (Q, C).
        boxes: (Q, 4) cxcywh in [0, 1].
        image_size: height and width in pixels of the unpadded image; the unit of the boxes.
        max_detections: K; less where there are fewer pairs.
    """
    sizes = to_device([image_size], boxes.device)
    return Detections(*(x[0] for x in batch_detections(logits[None], boxes[None], sizes, max_detections)))


def batch_detections(logits: Tensor, boxes: Tensor, sizes: Tensor, max_detections: int) -> Detections:
    """As `detections`, for a batch: all tensors have B in front.

    Args:
        logits: (B, Q, C).
        boxes: (B, Q, 4) cxcywh in [0, 1].
        sizes: (B, 2), height and width of each image in pixels.
        max_detections: K.
    """
    scores = to_float32(logits).sigmoid().flatten(1)  # (B, Q*C)
    scores, pair = scores.topk(at_most(max_detections, scores.shape[1]), dim=1)  # (B, K)
    query = torch.div(pair, logits.shape[2], rounding_mode="floor")
    boxes = cxcywh_to_xyxy(to_float32(boxes).gather(1, query[..., None].expand(-1, -1, 4)))
    pixels = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # (B, 1, 4)
    return Detections(boxes * pixels, scores, pair % logits.shape[2])


def one_label_detections(logits: Tensor, boxes: Tensor, image_size: tuple[int, int], max_detections: int) -> Detections:
    """As `detections`, but with the best class of each query alone, so that no box appears twice."""
    best = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()  # (Q, C)
    logits = to_float32(logits).masked_fill(~best, -math.inf)
    return detections(logits, boxes, image_size, min(max_detections, len(logits)))
