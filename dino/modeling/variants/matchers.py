"""Variants of `HungarianMatcher`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.layers.boxes import box_iou, cxcywh_to_xyxy, to_float32
from dino.layers.matcher import HungarianMatcher, NonFinite, Pairs, finite_costs, pad_targets
from dino.structures import LayerOutputs, Target
from dino.utils.device import to_device, to_host
from dino.utils.files import UserError

_EPS = 1e-8  # as the published program


class PositionModulatedMatcher(HungarianMatcher):
    """Class cost of the score times how well the box fits (position-modulated cost of Stable-DINO, arXiv 2304.04742).

    The score is multiplied by `((GIoU + 1) / 2) ** power`. As in the published program, the (GIoU + 1) / 2 of an image
    are scaled first, so that the best pair of a prediction and an object of that image has 1.

    Args:
        power: exponent of the position; 0 gives the costs of `HungarianMatcher`.
        arguments: of `HungarianMatcher`.
    """

    def __init__(self, *, power: float = 0.5, **arguments: Any):
        super().__init__(**arguments)
        self.power = power

    def class_term(self, scores: Tensor, giou: Tensor, targets: list[Target]) -> Tensor:
        """Class cost before its weight, see `HungarianMatcher.class_term`.

        The published program keeps one position for each class instead of each object: where objects of a batch share
        a class, all get the GIoU with the last of them, which may lie in another image. Here each pair has its own, and
        an image has the same costs in every batch.
        """
        position = (giou + 1) / 2  # (N, B, Q, G)
        counts = np.array([len(t.labels) for t in targets])
        own = to_device(np.arange(giou.shape[3]) < counts[:, None], giou.device)[:, None]  # (B, 1, G)
        # A NaN stays the cost of its own prediction. A column of zeros stands where no image has an object.
        best = F.pad(torch.where(own, position, 0).nan_to_num(0), (0, 1)).amax((2, 3), keepdim=True)  # (N, B, 1, 1)
        position = position / (best + _EPS)
        return super().class_term(scores * position**self.power, giou, targets)


class ThresholdMatcher(nn.Module):
    """Matches every prediction that is good enough to its best object (one-to-many assignment of DAC-DETR).

    The score of a prediction and an object is `iou_weight * IoU + (1 - iou_weight) * class score`. A prediction belongs
    to the object of its highest score, if that is at least `threshold`, or if it is the best of all predictions for any
    object. Each object keeps its `most` best ones. So a prediction has one object at most, and an object can have none,
    where its best prediction belongs to another one.

    The published program differs in three ways:

    - It takes IoUs with boxes of the pass with self-attention, and class scores of the pass without. Here both are
      those of the predictions whose losses are computed. The boxes of the two passes differ after the first layer; so
      there a box would be trained towards an object because another box lies on it.
    - It counts the predictions that belong to an object, but then gives it that many of the best in all. So a
      prediction can get two objects, that is two boxes to be at once.
    - It draws 75 of an image's predictions that belong to objects where there are more. Here nothing is random.

    Args:
        threshold: least score.
        most: most predictions of an object.
        iou_weight: weight of the IoU in the score.
    """

    def __init__(self, *, threshold: float = 0.4, most: int = 6, iou_weight: float = 0.7):
        super().__init__()
        if most < 1:
            raise UserError(f"ThresholdMatcher: most is {most}, but an object needs at least one prediction")
        self.threshold = threshold
        self.most = most
        self.iou_weight = iou_weight

    def forward(self, predictions: LayerOutputs, targets: list[Target], *, non_finite: NonFinite = "raise") -> Pairs:
        """Match N layers of B images; arguments and errors are those of `HungarianMatcher.forward`.

        Returns:
            for each layer, for each image, (query indices, ascending; object indices), both int64.
        """
        return self.start(predictions, targets, non_finite=non_finite)()

    @torch.no_grad()
    def start(
        self, predictions: LayerOutputs, targets: list[Target], *, non_finite: NonFinite = "raise"
    ) -> Callable[[], Pairs]:
        """Start to compute the scores on the device, see `HungarianMatcher.start`."""
        costs = to_host(-self.score(predictions, targets))  # the one transfer to the host
        counts = [len(t.labels) for t in targets]
        return lambda: self.assign(-finite_costs(costs().numpy(), counts, non_finite), counts)

    def score(self, predictions: LayerOutputs, targets: list[Target]) -> Tensor:
        """(N, B, Q, G) with G objects in the fullest image; columns past an image's own objects mean nothing."""
        logits, boxes = to_float32(predictions.logits), to_float32(predictions.boxes)
        labels, true_boxes = pad_targets(targets)
        labels = labels[None, :, None].expand(*logits.shape[:3], -1)  # (N, B, Q, G)
        iou = box_iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(true_boxes.to(boxes))[:, None])
        return self.iou_weight * iou + (1 - self.iou_weight) * logits.gather(3, labels).sigmoid()

    def assign(self, score: np.ndarray, counts: list[int]) -> Pairs:
        """Scores (N, B, Q, G), finite, and the objects of each of B images -> pairs."""
        return [[self.choose(layer[b, :, :count]) for b, count in enumerate(counts)] for layer in score]

    def choose(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, G) of one image -> its pairs."""
        if not score.size:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        own = score.argmax(1)  # (Q,) the object of each prediction
        belongs = score.max(1) >= self.threshold
        belongs[score.argmax(0)] = True
        query = np.flatnonzero(belongs)
        query = query[np.lexsort((-score[query, own[query]], own[query]))]  # object after object, best first
        rank = np.arange(len(query)) - np.searchsorted(own[query], own[query])
        query = np.sort(query[rank < self.most])
        return query, own[query]
