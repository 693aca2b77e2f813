"""One-to-one assignment of predictions to ground truth (DETR, arXiv 2005.12872, eq. 1, with a focal class cost)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .boxes import cxcywh_to_xyxy, generalized_iou, widened
from .structures import Predictions, Target


class NonFiniteCostError(FloatingPointError):
    """A matching cost is NaN or infinite; `image` is the index of its image in the batch."""

    def __init__(self, image: int):
        super().__init__(f"non-finite predictions or boxes for image {image} of the batch")
        self.image = image


class HungarianMatcher(nn.Module):
    """Finds, for every image and layer, the assignment of least total cost.

    Args:
        class_cost, l1_cost, giou_cost: weights of the three terms.
        alpha, gamma: of the focal class term.
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.class_cost = class_cost
        self.l1_cost = l1_cost
        self.giou_cost = giou_cost
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: list[Target]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Match N layers of B images.

        Returns:
            for each layer, for each image, (query indices, ascending; object indices), both int64 of min(Q, G) entries.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite.
        """
        cost = self.cost(predictions, targets).cpu().numpy()  # the one transfer to the host of a training step
        counts = [len(t.labels) for t in targets]
        for image, count in enumerate(counts):
            if not np.isfinite(cost[:, image, :, :count]).all():
                raise NonFiniteCostError(image)
        return [[linear_sum_assignment(layer[i, :, :n]) for i, n in enumerate(counts)] for layer in cost]

    def cost(self, predictions: Predictions, targets: list[Target]) -> Tensor:
        """(N, B, Q, G) with G objects in the fullest image; columns past an image's own objects mean nothing."""
        logits, boxes = widened(predictions.logits), widened(predictions.boxes)
        labels, true_boxes = pad_targets(targets)
        labels = labels[None, :, None].expand(*logits.shape[:3], -1)  # (N, B, Q, G)
        l1 = torch.cdist(boxes, true_boxes.to(boxes)[None], p=1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(true_boxes.to(boxes))[:, None])
        class_term = focal_cost(logits.gather(3, labels), self.alpha, self.gamma)
        return self.class_cost * class_term + self.l1_cost * l1 - self.giou_cost * giou


def pad_targets(targets: list[Target]) -> tuple[Tensor, Tensor]:
    """-> labels (B, G) and boxes (B, G, 4) with G objects in the fullest image; zeros behind an image's own objects."""
    labels = nn.utils.rnn.pad_sequence([t.labels for t in targets], batch_first=True)
    boxes = nn.utils.rnn.pad_sequence([t.boxes for t in targets], batch_first=True)
    return labels, boxes


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """What it costs to call a logit positive instead of negative; any shape."""
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative
