"""The set criterion: every prediction set is matched, then charged for class, box and overlap (paper section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dino.structures import DenoisingOutputs, LayerOutputs, Outputs, Target
from dino.utils.device import to_device

from .boxes import cxcywh_to_xyxy, generalized_iou, to_float32
from .matcher import Pairs, start_matching


class Matches(NamedTuple):
    """K pairs of a prediction and an object, the same number for every layer, sorted by layer."""

    query: Tensor  # (K,) int64, index into the queries of all layers and images, one layer and image after the other
    target: Tensor  # (K,) int64, index into the objects of all images, one image after the other


class SetCriterion(nn.Module):
    """Turns the outputs of DINO into a dictionary of weighted losses; their plain sum is the training loss.

    Names: `loss_ce`, `loss_bbox`, `loss_giou` for the last decoder layer, with `_0`, `_1` … for the earlier ones,
    `_interm` for the encoder's proposals, and `_dn`, `_dn_0` … for denoising.

    Args:
        matcher: (LayerOutputs, targets) -> pairs, see `HungarianMatcher`.
        class_weight, l1_weight, giou_weight: weights of the three losses, equal for all prediction sets.
        alpha, gamma: of the focal loss.
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
        self.average = average_over_workers  # replaced where a batch comes in parts

    def forward(self, outputs: Outputs, targets: list[Target]) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars in float32.

        Raises:
            NonFiniteCostError: see `HungarianMatcher`; elsewhere NaN predictions make NaN losses.
        """
        noised = outputs.denoising.targets if outputs.denoising else []
        num_boxes, num_noised = self.average([count(targets), count(noised)], outputs.decoder.boxes.device)
        names = [f"_{i}" for i in range(len(outputs.decoder.logits) - 1)]
        matched = LayerOutputs(*(torch.cat(pair) for pair in zip(outputs.decoder, outputs.proposals, strict=True)))
        matching = start_matching(self.matcher, matched, targets)
        # All that needs no matches comes first: the device works on it while the host matches.
        negatives = self.charge_negatives(matched.logits)
        denoised = {}
        if outputs.denoising:
            sums = self.denoising_losses(outputs.denoising)
            scale = num_noised * max(1, outputs.denoising.num_groups)
            denoised = self.named(sums, scale, [f"_dn{name}" for name in [*names, ""]])
        pairs = flatten_matches(matching(), targets, matched)
        suffixes = [*names, "", *["_interm"] * len(outputs.proposals.logits)]
        return self.named(self.losses(matched, negatives, pairs, targets), num_boxes, suffixes) | denoised

    def named(self, sums: dict[str, Tensor], num_boxes: Tensor, suffixes: list[str]) -> dict[str, Tensor]:
        """{"ce": (N,), …} -> {"loss_ce" + suffix of the layer: weighted scalar, …}."""
        return {
            f"loss_{key}{suffix}": value
            for key, layers in sums.items()
            for suffix, value in zip(suffixes, (layers / num_boxes * self.weights[key]).unbind(), strict=True)
        }

    def losses(
        self, predictions: LayerOutputs, negatives: Tensor, matches: Matches, targets: list[Target]
    ) -> dict[str, Tensor]:
        """The three losses of N layers, summed over all images and queries -> (N,) each.

        Args:
            negatives: (N,) of `charge_negatives`.
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
            "ce": negatives + self.charge_positives(true_logits.view(per_layer)),
            "bbox": (boxes - true_boxes).abs().view(*per_layer, 4).sum((1, 2)),
            "giou": (1 - giou).view(per_layer).sum(1),
        }

    def charge_negatives(self, logits: Tensor) -> Tensor:
        """Focal loss of logits (N, B, Q, C) if all were negatives -> (N,). Positives are few."""
        return (1 - self.alpha) * focal_loss(to_float32(logits), self.gamma).sum((1, 2, 3))

    def charge_positives(self, true_logits: Tensor) -> Tensor:
        """What must be added for the logits that are positives, (N, K/N) in float32 -> (N,)."""
        negative = (1 - self.alpha) * focal_loss(true_logits, self.gamma)
        positive = self.alpha * focal_loss(-true_logits, self.gamma)
        return (positive - negative).sum(1)

    def denoising_losses(self, denoising: DenoisingOutputs) -> dict[str, Tensor]:
        """As `losses`, with pairs known by construction; zero, but part of the graph, where nothing was noised."""
        predictions, targets, num_groups = denoising
        if num_groups == 0:
            logits, boxes = (to_float32(x).sum((1, 2, 3)) * 0 for x in predictions)
            return {"ce": logits, "bbox": boxes, "giou": boxes}
        layers, _, slots, _ = predictions.boxes.shape
        known = [known_matches(len(t.labels), num_groups, slots) for t in targets]
        matches = flatten_matches([known] * layers, targets, predictions)
        return self.losses(predictions, self.charge_negatives(predictions.logits), matches, targets)


def focal_loss(wrong: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss without its weight alpha (RetinaNet, arXiv 1708.02002, eq. 4), of any shape.

    `wrong` is the logit of the wrong answer: the logit of a negative, minus the logit of a positive.
    """
    return wrong.sigmoid() ** gamma * F.softplus(wrong)


def known_matches(num_objects: int, num_groups: int, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Object g belongs to slot g of the positive half of each group; negatives and padding stay background."""
    objects = np.arange(num_objects)
    starts = np.arange(num_groups) * (num_slots // num_groups)
    return (starts[:, None] + objects).ravel(), np.tile(objects, num_groups)


def flatten_matches(layers: Pairs, targets: list[Target], predictions: LayerOutputs) -> Matches:
    """Pairs per layer and image -> one table, moved to the device of the predictions at once."""
    _, images, queries, _ = predictions.boxes.shape
    first = np.cumsum([0] + [len(t.labels) for t in targets])
    rows = [
        np.stack([(n * images + b) * queries + query, first[b] + target])
        for n, pairs in enumerate(layers)
        for b, (query, target) in enumerate(pairs)
    ]
    return Matches(*to_device(np.concatenate(rows, 1), predictions.boxes.device, torch.int64))


def count(targets: list[Target]) -> int:
    """Number of objects of all images."""
    return sum(len(t.labels) for t in targets)


def average_over_workers(counts: list[int], device: torch.device) -> Tensor:
    """Mean of each count over all processes, at least 1 -> (len(counts),) float32; no transfer back to the host."""
    total = to_device(counts, device, torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp(min=1)
