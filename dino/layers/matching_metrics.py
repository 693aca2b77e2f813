"""Metrics of the last layer's matching that are logged beside the losses, never part of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dino.structures import SCORE_THRESH, Target
from dino.utils.device import to_device
from dino.utils.files import UserError


class _Matches(Protocol):
    """Pairs of a prediction and an object, layer after layer."""

    query: Tensor  # (K,) int64, index into the queries of all layers and images
    target: Tensor  # (K,) int64, index into the objects of all images
    counts: list[int]  # pairs of each layer


class MatchingMetrics:
    """Collects what a criterion knows of its matching, over all parts of a batch; see `values`.

    One serves one batch. `SetCriterion.forward` takes it as its argument `metrics`.
    """

    NAMES = ("class_error", "cardinality_error", "count_error")

    def __init__(self):
        self.sums: Tensor | None = None  # (3,) float32: wrong classes, errors of both counts
        self.num_pairs = self.num_images = 0

    @torch.no_grad()
    def add(self, logits: Tensor, matches: _Matches, layer: int, targets: Sequence[Target]) -> None:
        """Add a part of the batch; nothing is transferred back to the host.

        Args:
            logits: (N, B, Q, C) of all layers.
            matches: pairs of predictions and objects.
            layer: the number of the layer that counts.
            targets: the objects of each of the B images.
        """
        query, target = (indices.split(matches.counts)[layer] for indices in (matches.query, matches.target))
        best = logits.flatten(0, 2)[query].argmax(1)  # (K,)
        wrong = (best != torch.cat([t.labels for t in targets])[target]).sum()
        logits, counts = logits[layer], [len(t.labels) for t in targets]
        objects = to_device(counts, logits.device, torch.int64)  # (B,)
        not_last = (logits.argmax(2) != logits.shape[2] - 1).sum(1)
        shown = (logits.amax(2).float().sigmoid() >= SCORE_THRESH).sum(1)
        sums = torch.stack([wrong, *((found - objects).abs().sum() for found in (not_last, shown))]).float()
        self.sums = sums if self.sums is None else self.sums + sums
        self.num_pairs += len(query)
        self.num_images += len(counts)

    def values(self) -> dict[str, Tensor]:
        """The metrics of the batch, scalars in float32.

        Returns:
            `class_error`: 100 minus the percentage of matched predictions whose highest logit is that of their object's
            class; 100 without objects. `cardinality_error`: mean over the images of |predictions whose highest logit is
            not that of the last class - objects|. Both as of the official program, which has the second one from DETR:
            there the last class means "no object". Here it is an ordinary class, so that nearly every prediction
            counts. `count_error`: mean over the images of |predictions with a score of `SCORE_THRESH` - objects|.

        Raises:
            UserError: the criterion has added nothing.
        """
        if self.sums is None:
            raise UserError(
                "train.log_matching=True, but the criterion takes no `metrics`: let its forward accept **options and "
                "pass them on to a SetCriterion, or set train.log_matching=False"
            )
        wrong, cardinality, count = self.sums.unbind()
        class_error = 100 * wrong / self.num_pairs if self.num_pairs else torch.full_like(wrong, 100)
        errors = class_error, cardinality / self.num_images, count / self.num_images
        return dict(zip(self.NAMES, errors, strict=True))
