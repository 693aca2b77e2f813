"""The set criterion: matches every set of predictions, then computes class, L1 and GIoU losses (paper section 3.1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dino.structures import DenoisingOutputs, LayerOutputs, Outputs, Target
from dino.utils.device import to_device
from dino.utils.files import UserError

from .boxes import cxcywh_to_xyxy, generalized_iou, to_float32
from .matcher import NonFinite, Pairs, start_matching, takes


class _Matches(NamedTuple):
    """K pairs of a prediction and an object, the same number for every layer, sorted by layer."""

    query: Tensor  # (K,) int64, index into the queries of all layers and images: layer after layer, image after image
    target: Tensor  # (K,) int64, index into the objects of all images: image after image


class SetCriterion(nn.Module):
    """Computes the weighted losses of DINO's outputs; their plain sum is the training loss.

    Names: `loss_ce`, `loss_bbox`, `loss_giou` for the last decoder layer, with `_0`, `_1` … for the earlier layers,
    `_interm` for the encoder's proposals, and `_dn`, `_dn_0` … for denoising.

    A wrapper of a criterion passes keyword arguments through: `self.criterion(outputs, targets, **options)`.

    Args:
        matcher: (LayerOutputs, targets) -> pairs, see `HungarianMatcher`.
        class_weight, l1_weight, giou_weight: weights of the three losses, equal for all sets of predictions.
        alpha, gamma: parameters of the focal loss.
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
    ):
        super().__init__()
        self.matcher = matcher
        self.weights = {"ce": class_weight, "bbox": l1_weight, "giou": giou_weight}
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self,
        outputs: Outputs,
        targets: list[Target],
        *,
        normalizer: Tensor | None = None,
        non_finite: NonFinite = "raise",
    ) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars in float32.

        Args:
            outputs: of the network.
            targets: the objects of each image.
            normalizer: (2,) float32, at least 1: the numbers of objects and of denoised objects, by which the sums over
                both are divided. None: those of this batch, averaged over the processes. Where a batch comes in parts,
                give every part the numbers of the whole batch (`global_loss_normalizer`); the sum of the parts' losses
                is then the loss of the whole batch.
            non_finite: see `HungarianMatcher.forward`.

        Raises:
            NonFiniteCostError: see `HungarianMatcher.forward`; elsewhere NaN predictions give NaN losses.
        """
        if normalizer is None:
            denoised = outputs.denoising.targets if outputs.denoising else []
            normalizer = global_loss_normalizer(_count(targets), _count(denoised), outputs.decoder.boxes.device)
        num_objects, num_denoised = normalizer
        layers = [f"_{i}" for i in range(len(outputs.decoder.logits) - 1)]
        matched = LayerOutputs(*(torch.cat(pair) for pair in zip(outputs.decoder, outputs.proposals, strict=True)))
        matching = start_matching(self.matcher, matched, targets, non_finite)
        # What needs no matches comes first: the device computes it while the host matches.
        negatives = self.negative_focal_loss(matched.logits)
        denoising_losses = {}
        if outputs.denoising:
            sums = self.denoising_losses(outputs.denoising)
            scale = num_denoised * max(1, outputs.denoising.num_groups)
            denoising_losses = self._weighted(sums, scale, [f"_dn{layer}" for layer in [*layers, ""]])
        matches = _flatten_matches(matching(), targets, matched)
        suffixes = [*layers, "", *["_interm"] * len(outputs.proposals.logits)]
        sums = self.losses(matched, negatives, matches, targets)
        return self._weighted(sums, num_objects, suffixes) | denoising_losses

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
            negatives: (N,) of `negative_focal_loss`.
            matches: pairs of predictions and objects.
        """
        logits, boxes = to_float32(predictions.logits), to_float32(predictions.boxes)
        layers = len(logits)
        labels = torch.cat([t.labels for t in targets])[matches.target]  # (K,)
        true_boxes = torch.cat([t.boxes for t in targets]).to(boxes)[matches.target]  # (K, 4)
        boxes = boxes.flatten(0, 2).index_select(0, matches.query)  # (K, 4)
        true_logits = logits.flatten().gather(0, matches.query * logits.shape[3] + labels)  # (K,)
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(true_boxes))  # (K,)
        per_layer = (layers, len(boxes) // layers)
        return {
            "ce": negatives + self.positive_focal_loss(true_logits.view(per_layer)),
            "bbox": (boxes - true_boxes).abs().view(*per_layer, 4).sum((1, 2)),
            "giou": (1 - giou).view(per_layer).sum(1),
        }

    def negative_focal_loss(self, logits: Tensor) -> Tensor:
        """Focal loss of logits (N, B, Q, C) as if all were negatives -> (N,). Positives are few."""
        return (1 - self.alpha) * focal_loss(to_float32(logits), self.gamma).sum((1, 2, 3))

    def positive_focal_loss(self, true_logits: Tensor) -> Tensor:
        """Focal loss of positives (N, K/N) in float32, minus their share of `negative_focal_loss` -> (N,)."""
        negative = (1 - self.alpha) * focal_loss(true_logits, self.gamma)
        positive = self.alpha * focal_loss(-true_logits, self.gamma)
        return (positive - negative).sum(1)

    def denoising_losses(self, denoising: DenoisingOutputs) -> dict[str, Tensor]:
        """As `losses`, with pairs known by construction. Zero, but part of the graph, where no object is denoised."""
        predictions, targets, num_groups = denoising
        if num_groups == 0:
            logits, boxes = (to_float32(x).sum((1, 2, 3)) * 0 for x in predictions)
            return {"ce": logits, "bbox": boxes, "giou": boxes}
        layers, _, num_queries, _ = predictions.boxes.shape
        known = [_known_pairs(len(t.labels), num_groups, num_queries) for t in targets]
        matches = _flatten_matches([known] * layers, targets, predictions)
        return self.losses(predictions, self.negative_focal_loss(predictions.logits), matches, targets)


def focal_loss(wrong: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss without its weight alpha (RetinaNet, arXiv 1708.02002, eq. 4), of any shape.

    `wrong` is the logit of the wrong answer: for a negative its logit, for a positive the opposite of its logit.
    """
    return wrong.sigmoid() ** gamma * F.softplus(wrong)


def _known_pairs(num_objects: int, num_groups: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair object g with query g of each group, a positive. Negatives and padding queries stay background."""
    objects = np.arange(num_objects)
    starts = np.arange(num_groups) * (num_queries // num_groups)
    return (starts[:, None] + objects).ravel(), np.tile(objects, num_groups)


def _flatten_matches(layers: Pairs, targets: list[Target], predictions: LayerOutputs) -> _Matches:
    """Pairs per layer and image -> one table, in one transfer to the device of the predictions."""
    _, images, queries, _ = predictions.boxes.shape
    first = np.cumsum([0] + [len(t.labels) for t in targets])
    rows = [
        np.stack([(n * images + b) * queries + query, first[b] + target])
        for n, pairs in enumerate(layers)
        for b, (query, target) in enumerate(pairs)
    ]
    return _Matches(*to_device(np.concatenate(rows, 1), predictions.boxes.device, torch.int64))


def _count(targets: list[Target]) -> int:
    """Number of objects of all images."""
    return sum(len(t.labels) for t in targets)


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
