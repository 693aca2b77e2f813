"""The set criterion: matches every set of predictions, then computes class, L1 and GIoU losses (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino.structures import DenoisingOutputs, LayerOutputs, Outputs, Target
from dino.utils.device import to_device
from dino.utils.files import UserError

from .boxes import cxcywh_to_xyxy, generalized_iou, to_float32
from .class_loss import FocalLoss, Positives
from .matcher import NonFinite, Pairs, start_matching, takes
from .matching_metrics import MatchingMetrics

# The targets (K,) of the class loss, or None, and the pairs -> weights (K,) of the pairs; None for 1.
PairWeights = Callable[[Tensor | None, Positives], Tensor | None]


class _Matches(NamedTuple):
    """K pairs of a prediction and an object, layer after layer, image after image."""

    query: Tensor  # (K,) int64, index into the queries of all layers and images
    target: Tensor  # (K,) int64, index into the objects of all images
    counts: list[int]  # pairs of each of N layers
    pair_weights: PairWeights | None = None

    def sum_layers(self, values: Tensor) -> Tensor:
        """Values (K, ...) -> (N,), the sums over the pairs of each layer."""
        if len(set(self.counts)) == 1:  # one operation
            return values.unflatten(0, (len(self.counts), self.counts[0])).flatten(1).sum(1)
        return torch.stack([part.sum() for part in values.split(self.counts)])


class SetCriterion(nn.Module):
    """Computes the weighted losses of DINO's outputs; their plain sum is the training loss.

    Names: `loss_ce`, `loss_bbox`, `loss_giou` for the last decoder layer, with `_0`, `_1` … for the earlier layers,
    `_interm` for the encoder's proposals, and `_dn`, `_dn_0` … for denoising.

    A wrapper of a criterion passes keyword arguments through: `self.criterion(outputs, targets, **options)`.

    Args:
        matcher: (LayerOutputs, targets) -> pairs, see `HungarianMatcher`.
        class_weight, l1_weight, giou_weight: weights of the three losses, equal for all sets of predictions.
        alpha, gamma: parameters of the focal loss.
        class_loss: another classification loss, see `dino.layers.class_loss`; it has its own parameters.
    """

    def __init__(
        self,
        *,
        matcher: nn.Module,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_loss: nn.Module | None = None,
    ):
        super().__init__()
        for method in ("negative_focal_loss", "positive_focal_loss"):
            if hasattr(self, method):  # of a subclass written before there was `class_loss`
                raise UserError(f"{type(self).__name__}.{method} is not used any more: give a `class_loss`")
        self.matcher = matcher
        self.weights = {"ce": class_weight, "bbox": l1_weight, "giou": giou_weight}
        self.class_loss = class_loss or FocalLoss(alpha=alpha, gamma=gamma)

    def forward(
        self,
        outputs: Outputs,
        targets: list[Target],
        *,
        normalizer: Tensor | None = None,
        non_finite: NonFinite = "raise",
        metrics: MatchingMetrics | None = None,
    ) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars in float32.

        Args:
            outputs, targets: of the network; the objects of each image.
            normalizer: (2,) float32, at least 1: numbers of objects and of denoised objects, as divisors. None: this
                batch's, averaged over the processes. Give a part of a batch those of the whole: losses then add up.
            non_finite: see `HungarianMatcher.forward`.
            metrics: collects the matching of the last decoder layer.

        Raises:
            NonFiniteCostError: see `HungarianMatcher.forward`; elsewhere NaN predictions give NaN losses.
        """
        if normalizer is None:
            divided = targets, outputs.denoising.targets if outputs.denoising else []
            counts = [sum(len(t.labels) for t in part) for part in divided]
            normalizer = global_loss_normalizer(*counts, outputs.decoder.boxes.device)
        num_objects, num_denoised = normalizer
        layers = [f"_{i}" for i in range(len(outputs.decoder.logits) - 1)]
        matched = LayerOutputs(*(torch.cat(pair) for pair in zip(outputs.decoder, outputs.proposals, strict=True)))
        copies = self.copies(len(outputs.decoder.logits), len(outputs.proposals.logits))
        matching = start_matching(self.matcher, matched, targets, non_finite, copies)
        # What needs no matches comes first: the device computes it while the host matches.
        negatives = self.class_loss.negatives(matched.logits)
        denoising_losses = {}
        if outputs.denoising:
            sums = self.denoising_losses(outputs.denoising)
            scale = num_denoised * max(1, outputs.denoising.num_groups)
            denoising_losses = self._weighted(sums, scale, [f"_dn{layer}" for layer in [*layers, ""]])
        matches = _flatten_matches(matching(), targets, matched, self.pair_weights)
        if metrics is not None:
            metrics.add(matched.logits, matches, len(layers), targets)
        suffixes = [*layers, "", *["_interm"] * len(outputs.proposals.logits)]
        sums = self.losses(matched, negatives, matches, targets)
        return self._weighted(sums, self.divisor(num_objects), suffixes) | denoising_losses

    def copies(self, num_layers: int, num_proposals: int) -> list[int] | None:
        """Predictions that each object gets in N decoder layers and the proposals; None for one everywhere."""
        return None

    def divisor(self, num_objects: Tensor) -> Tensor:
        """The number of objects, a scalar of at least 1 -> what divides the losses of all predictions but denoising."""
        return num_objects

    def pair_weights(self, quality: Tensor | None, pairs: Positives) -> Tensor | None:
        """Weights of the pairs, see `PairWeights`. Denoising has none."""
        return None

    def _weighted(self, sums: dict[str, Tensor], scale: Tensor, suffixes: list[str]) -> dict[str, Tensor]:
        """{"ce": (N,), …} -> {"loss_ce" + suffix of the layer: scalar, divided by `scale` and weighted, …}."""
        return {
            f"loss_{key}{suffix}": value
            for key, layers in sums.items()
            for suffix, value in zip(suffixes, (layers / scale * self.weights[key]).unbind(), strict=True)
        }

    def losses(
        self, predictions: LayerOutputs, negatives: Tensor, matches: _Matches, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Sum the three losses of N layers over all images and queries -> (N,) each.

        Args:
            predictions, targets: N layers of B images; the objects of each image.
            negatives: (N,), class loss of all predictions as negatives.
            matches: pairs of predictions and objects.
        """
        logits, boxes = to_float32(predictions.logits), to_float32(predictions.boxes)
        labels = torch.cat([t.labels for t in targets])[matches.target]  # (K,)
        objects = torch.cat([t.boxes for t in targets]).to(boxes)  # (G, 4)
        pairs = Positives(
            logits=logits.flatten().gather(0, matches.query * logits.shape[3] + labels),
            boxes=boxes.flatten(0, 2).index_select(0, matches.query),
            true_boxes=objects[matches.target],
            query=matches.query,
            target=matches.target,
            shape=tuple(logits.shape[:3]),
            num_objects=len(objects),
        )
        l1 = (pairs.boxes - pairs.true_boxes).abs()  # (K, 4)
        giou = 1 - generalized_iou(cxcywh_to_xyxy(pairs.boxes), cxcywh_to_xyxy(pairs.true_boxes))  # (K,)
        quality = self.class_loss.targets(pairs)  # (K,)
        weights = matches.pair_weights(quality, pairs) if matches.pair_weights else None  # (K,)
        if weights is not None:
            quality, l1, giou = quality * weights, l1 * weights[:, None], giou * weights
        return {
            "ce": negatives + matches.sum_layers(self.class_loss.positives(pairs.logits, quality)),
            "bbox": matches.sum_layers(l1),
            "giou": matches.sum_layers(giou),
        }

    def denoising_losses(self, denoising: DenoisingOutputs) -> dict[str, Tensor]:
        """As `losses`, with pairs known by construction. Zero, but part of the graph, where no object is denoised."""
        predictions, targets, num_groups = denoising
        if num_groups == 0:
            logits, boxes = (to_float32(x).sum((1, 2, 3)) * 0 for x in predictions)
            return {"ce": logits, "bbox": boxes, "giou": boxes}
        layers, _, num_queries, _ = predictions.boxes.shape
        known = [_known_pairs(len(t.labels), num_groups, num_queries) for t in targets]
        matches = _flatten_matches([known] * layers, targets, predictions)
        return self.losses(predictions, self.class_loss.negatives(predictions.logits), matches, targets)


def _known_pairs(num_objects: int, num_groups: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair object g with query g of each group, a positive. Negatives and padding queries stay background."""
    objects = np.arange(num_objects)
    starts = np.arange(num_groups) * (num_queries // num_groups)
    return (starts[:, None] + objects).ravel(), np.tile(objects, num_groups)


def _flatten_matches(
    layers: Pairs, targets: list[Target], predictions: LayerOutputs, pair_weights: PairWeights | None = None
) -> _Matches:
    """Pairs per layer and image -> one table, in one transfer to the device of the predictions."""
    _, images, queries, _ = predictions.boxes.shape
    first = np.cumsum([0] + [len(t.labels) for t in targets])
    rows = [
        np.stack([(n * images + b) * queries + query, first[b] + target])
        for n, pairs in enumerate(layers)
        for b, (query, target) in enumerate(pairs)
    ]
    counts = [sum(len(query) for query, _ in pairs) for pairs in layers]
    query, target = to_device(np.concatenate(rows, 1), predictions.boxes.device, torch.int64)
    return _Matches(query, target, counts, pair_weights)


def global_loss_normalizer(num_objects: int, num_denoised: int, device: torch.device) -> Tensor:
    """Average both numbers over all processes -> (2,) float32, at least 1; no transfer back to the host.

    All processes must call this, with the numbers of their own share of a batch.
    """
    total = to_device([num_objects, num_denoised], device, torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp(min=1)


def call_criterion(criterion: nn.Module, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
    """Call any criterion with those of `options` (see `SetCriterion.forward`) that it takes.

    Options at their defaults are left out, so that a criterion of two arguments works.

    Raises:
        UserError: a batch comes in parts, and the criterion takes no `normalizer`.
    """
    given = {k: v for k, v in options.items() if isinstance(v, Tensor) or v not in (None, "raise")}
    if "normalizer" in given:
        check_normalizer(criterion)
    return criterion(outputs, targets, **{k: v for k, v in given.items() if takes(criterion, k)})


def check_normalizer(part: nn.Module) -> None:
    """Check that a criterion or a detector takes a `normalizer`, which the losses of a batch in parts need.

    Raises:
        UserError: it takes none.
    """
    if not takes(part, "normalizer"):
        raise UserError(
            f"{type(part).__name__} takes no `normalizer`, so a batch can't come in parts: set "
            "train.grad_accum_steps=1, or let its forward accept **options and pass them on"
        )
