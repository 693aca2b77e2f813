"""One-to-one assignment of predictions to ground truth (DETR, arXiv 2005.12872, eq. 1, with a focal class cost)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dino.structures import LayerOutputs, Target
from dino.utils.device import to_device, to_host
from dino.utils.files import UserError

from .boxes import cxcywh_to_xyxy, generalized_iou, to_float32

Pairs = list[list[tuple[np.ndarray, np.ndarray]]]  # for each layer, for each image: (query indices, object indices)

NonFinite = Literal["raise", "match"]  # the answer to a cost that is NaN or infinite, see `HungarianMatcher.forward`

_MANY = 1000  # objects of all problems together; SciPy takes 5 to 8 microseconds for each, among 900 queries
_THREADS = 4  # for so many objects
_CHEAPEST = -1e30  # replaces a non-finite cost; no finite cost is lower


class NonFiniteCostError(FloatingPointError):
    """A matching cost is NaN or infinite; `image` is the index of its image in the batch."""

    def __init__(self, image: int):
        super().__init__(f"non-finite predictions or boxes for image {image} of the batch")
        self.image = image


class HungarianMatcher(nn.Module):
    """Finds the assignment of least total cost, for every image and layer.

    Args:
        class_cost, l1_cost, giou_cost: weights of the three terms.
        alpha, gamma: parameters of the focal class term.
        copies_share: most of the queries, as a part of them, that several predictions for each object may take; 0.5 in
            Align-DETR.
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        copies_share: float = 1.0,
    ):
        super().__init__()
        self.class_cost = class_cost
        self.l1_cost = l1_cost
        self.giou_cost = giou_cost
        self.alpha = alpha
        self.gamma = gamma
        self.copies_share = copies_share

    def forward(
        self,
        predictions: LayerOutputs,
        targets: list[Target],
        *,
        non_finite: NonFinite = "raise",
        copies: Sequence[int] | None = None,
    ) -> Pairs:
        """Match N layers of B images.

        Args:
            predictions, targets: N layers of B images; the objects of each image.
            non_finite: "raise" ends with an error where a cost is NaN or infinite. "match" returns pairs all the same,
                and pairs such predictions first, so that the losses are not finite either. Then all processes reach
                the end of the step and can skip it together.
            copies: how many predictions each object gets, for each layer; 1 by default. A crowded image gets fewer, see
                `copies_share`, but at least one.

        Returns:
            for each layer, for each image, (query indices, ascending; object indices), both int64 of min(Q, copies * G)
            entries.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite, and `non_finite` is "raise".
        """
        return self.start(predictions, targets, non_finite=non_finite, copies=copies)()

    @torch.no_grad()
    def start(
        self,
        predictions: LayerOutputs,
        targets: list[Target],
        *,
        non_finite: NonFinite = "raise",
        copies: Sequence[int] | None = None,
    ) -> Callable[[], Pairs]:
        """Start to compute the costs on the device. Arguments are those of `forward`.

        Returns:
            a function that waits for the costs, matches on the host, and returns or raises what `forward` does. The
            device can do other work before the call.
        """
        costs = to_host(self.cost(predictions, targets))  # the one transfer to the host of a training step
        counts = [len(t.labels) for t in targets]
        return lambda: self.assign(finite_costs(costs().numpy(), counts, non_finite), counts, copies)

    def assign(self, cost: np.ndarray, counts: list[int], copies: Sequence[int] | None = None) -> Pairs:
        """Solve N * B assignment problems on the host.

        Args:
            cost: (N, B, Q, G), finite; an image's own objects come first along G.
            counts: objects of each of B images.
            copies: see `forward`.
        """
        copies = copies or [1] * len(cost)
        problems = [
            _repeat(layer[image, :, :count], times, self.copies_share)
            for layer, times in zip(cost, copies, strict=True)
            for image, count in enumerate(counts)
        ]
        pairs = _solve(problems, sum(problem.shape[1] for problem in problems))
        sizes = [max(count, 1) for count in counts] * len(cost)
        pairs = [(query, target % size) for (query, target), size in zip(pairs, sizes, strict=True)]
        return [pairs[i : i + len(counts)] for i in range(0, len(pairs), len(counts))]

    def cost(self, predictions: LayerOutputs, targets: list[Target]) -> Tensor:
        """(N, B, Q, G) with G objects in the fullest image; columns past an image's own objects mean nothing."""
        logits, boxes = to_float32(predictions.logits), to_float32(predictions.boxes)
        labels, true_boxes = pad_targets(targets)
        labels = labels[None, :, None].expand(*logits.shape[:3], -1)  # (N, B, Q, G)
        l1 = torch.cdist(boxes, true_boxes.to(boxes)[None], p=1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(true_boxes.to(boxes))[:, None])
        class_term = self.class_term(logits.gather(3, labels).sigmoid(), giou, targets)
        return self.class_cost * class_term + self.l1_cost * l1 - self.giou_cost * giou

    def class_term(self, scores: Tensor, giou: Tensor, targets: list[Target]) -> Tensor:
        """Class cost before its weight.

        Args:
            scores: (N, B, Q, G), of the class of each object.
            giou: (N, B, Q, G), of each prediction and object. Columns past an image's own objects mean nothing.
            targets: the objects of each image.
        """
        return _focal_cost(scores, self.alpha, self.gamma)


def _repeat(cost: np.ndarray, copies: int, share: float) -> np.ndarray:
    """(Q, G) -> (Q, copies * G); fewer copies where they need more than this share of the queries, but at least one.

    The published program of Align-DETR keeps the lower number for all later images of the batch, and has no pairs at
    all where an image's objects are more than half of the queries. Here an image has the same pairs in every batch.
    """
    queries, objects = cost.shape
    copies = min(copies, int(share * queries / max(objects, 1)))
    return np.tile(cost, copies) if copies > 1 else cost


def start_matching(
    matcher: nn.Module,
    predictions: LayerOutputs,
    targets: list[Target],
    non_finite: NonFinite = "raise",
    copies: Sequence[int] | None = None,
) -> Callable[[], Pairs]:
    """Start any matcher as `HungarianMatcher.start`; a matcher without `start` does all its work at the call.

    For a matcher that does not take `non_finite`, "match" pairs the first queries where it raises.

    Raises:
        UserError: objects need several predictions, and the matcher takes no `copies`.
    """
    own = getattr(matcher, "start", None)
    start = own or partial(partial, matcher)  # starting does nothing yet
    if copies:
        check_copies(matcher)
        start = partial(start, copies=copies)
    if non_finite == "raise":
        return start(predictions, targets)
    if takes(own or matcher, "non_finite"):
        return start(predictions, targets, non_finite=non_finite)
    return partial(_match_anyhow, start(predictions, targets), predictions, targets)


def check_copies(matcher: nn.Module) -> None:
    """Raise a UserError where a matcher can't give each object a chosen number of predictions."""
    if not takes(getattr(matcher, "start", matcher), "copies"):
        raise UserError(f"{type(matcher).__name__} decides how many predictions an object gets: it takes no `copies`")


def takes(function: Callable, argument: str) -> bool:
    """Whether a function, or the `forward` of a module, accepts a keyword argument of this name."""
    parameters = inspect.signature(getattr(function, "forward", function)).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _match_anyhow(matching: Callable[[], Pairs], predictions: LayerOutputs, targets: list[Target]) -> Pairs:
    """The result of `matching`; the first queries where it raises a NonFiniteCostError."""
    try:
        return matching()
    except NonFiniteCostError:
        layers, _, queries, _ = predictions.boxes.shape
        first = [np.arange(min(queries, len(target.labels))) for target in targets]
        return [[(pair, pair) for pair in first] for _ in range(layers)]


def _solve(problems: list[np.ndarray], num_objects: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Solve assignment problems with `num_objects` objects together; many in threads, which SciPy lets run at once."""
    if num_objects < _MANY:
        return [linear_sum_assignment(problem) for problem in problems]
    with ThreadPoolExecutor(_THREADS) as threads:  # ends its threads: a process that forks later has none
        return list(threads.map(linear_sum_assignment, problems))


def finite_costs(cost: np.ndarray, counts: list[int], non_finite: NonFinite) -> np.ndarray:
    """The costs (N, B, Q, G), with the lowest cost in place of non-finite ones.

    Raises:
        NonFiniteCostError: see `HungarianMatcher.forward`.
    """
    broken = [image for image, count in enumerate(counts) if not np.isfinite(cost[:, image, :, :count]).all()]
    if broken and non_finite != "match":
        raise NonFiniteCostError(broken[0])
    return np.where(np.isfinite(cost), cost, _CHEAPEST) if broken else cost


def pad_targets(targets: list[Target]) -> tuple[Tensor, Tensor]:
    """-> labels (B, G) and boxes (B, G, 4) with G objects in the fullest image; padding repeats any object."""
    counts = [len(t.labels) for t in targets]
    longest = max(counts)
    first = np.cumsum([0, *counts[:-1]])[:, None]
    index = np.minimum(first + np.arange(longest), max(sum(counts) - 1, 0))  # (B, G)
    index = to_device(index, targets[0].labels.device)
    return torch.cat([t.labels for t in targets])[index], torch.cat([t.boxes for t in targets])[index]


def _focal_cost(p: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of a score in [0, 1] as a positive minus its focal loss as a negative; any shape."""
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative
