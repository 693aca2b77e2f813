"""One-to-one assignment of predictions to ground truth (DETR, arXiv 2005.12872, eq. 1, with a focal class cost)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dino.structures import LayerOutputs, Target
from dino.utils.device import to_device, to_host

from .boxes import cxcywh_to_xyxy, generalized_iou, to_float32

Pairs = list[list[tuple[np.ndarray, np.ndarray]]]  # for each layer, for each image: (query indices, object indices)

MANY = 1000  # objects of all problems together; SciPy takes 5 to 8 microseconds for each, among 900 queries
THREADS = 4  # for so many objects


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

    def forward(self, predictions: LayerOutputs, targets: list[Target]) -> Pairs:
        """Match N layers of B images.

        Returns:
            for each layer, for each image, (query indices, ascending; object indices), both int64 of min(Q, G) entries.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite.
        """
        return self.start(predictions, targets)()

    @torch.no_grad()
    def start(self, predictions: LayerOutputs, targets: list[Target]) -> Callable[[], Pairs]:
        """Let the device compute the costs.

        Returns:
            a function that waits for them, matches on the host, and returns or raises what `forward` does. What the
            device is given before the call runs meanwhile.
        """
        costs = to_host(self.cost(predictions, targets))  # the one transfer to the host of a training step
        counts = [len(t.labels) for t in targets]
        return lambda: assign(costs().numpy(), counts)

    def cost(self, predictions: LayerOutputs, targets: list[Target]) -> Tensor:
        """(N, B, Q, G) with G objects in the fullest image; columns past an image's own objects mean nothing."""
        logits, boxes = to_float32(predictions.logits), to_float32(predictions.boxes)
        labels, true_boxes = pad_targets(targets)
        labels = labels[None, :, None].expand(*logits.shape[:3], -1)  # (N, B, Q, G)
        l1 = torch.cdist(boxes, true_boxes.to(boxes)[None], p=1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(true_boxes.to(boxes))[:, None])
        class_term = focal_cost(logits.gather(3, labels), self.alpha, self.gamma)
        return self.class_cost * class_term + self.l1_cost * l1 - self.giou_cost * giou


def start_matching(matcher: nn.Module, predictions: LayerOutputs, targets: list[Target]) -> Callable[[], Pairs]:
    """`HungarianMatcher.start` of any matcher: one that has no `start` does all its work at the call."""
    start = getattr(matcher, "start", None)
    return start(predictions, targets) if start else partial(matcher, predictions, targets)


def assign(cost: np.ndarray, counts: list[int]) -> Pairs:
    """Solve N * B problems, many objects in several threads: SciPy lets them run side by side.

    Args:
        cost: (N, B, Q, G), in each image's first columns for its own objects.
        counts: objects of each of B images.

    Raises:
        NonFiniteCostError: a cost is NaN or infinite.
    """
    for image, count in enumerate(counts):
        if not np.isfinite(cost[:, image, :, :count]).all():
            raise NonFiniteCostError(image)
    problems = [layer[image, :, :count] for layer in cost for image, count in enumerate(counts)]
    if len(cost) * sum(counts) < MANY:
        pairs = iter([linear_sum_assignment(problem) for problem in problems])
    else:  # threads end with the block: none is left behind for a process that forks
        with ThreadPoolExecutor(THREADS) as threads:
            pairs = threads.map(linear_sum_assignment, problems)
    return [[next(pairs) for _ in counts] for _ in cost]


def pad_targets(targets: list[Target]) -> tuple[Tensor, Tensor]:
    """-> labels (B, G) and boxes (B, G, 4) with G objects in the fullest image; any object stands behind its own."""
    counts = [len(t.labels) for t in targets]
    longest = max(counts)
    first = np.cumsum([0, *counts[:-1]])[:, None]
    index = np.minimum(first + np.arange(longest), max(sum(counts) - 1, 0))  # (B, G)
    index = to_device(index, targets[0].labels.device)
    return torch.cat([t.labels for t in targets])[index], torch.cat([t.boxes for t in targets])[index]


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """What it costs to call a logit positive instead of negative; any shape."""
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative
