"""Variants of `HungarianMatcher`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.layers.matcher import HungarianMatcher
from dino.structures import Target
from dino.utils.device import to_device

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
