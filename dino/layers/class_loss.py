"""Classification losses of the set criterion: DINO's focal loss, and losses whose targets follow the quality of a box.

Every prediction counts as a negative first; then the few positives get their own loss in place of that share. So a loss
has three parts, see `FocalLoss`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import box_iou, cxcywh_to_xyxy, to_float32

_EPS = 1e-8  # as the published programs


class Positives(NamedTuple):
    """K pairs of a prediction and its object: predictions of N layers, B images and Q queries, G objects of all images.

    What only some losses need is computed on demand: the focal loss needs the logits alone.
    """

    logits: Tensor  # (K,) float32, of the object's class
    boxes: Tensor  # (K, 4) float32
    true_boxes: Tensor  # (K, 4) float32
    query: Tensor  # (K,) int64, index into the queries of all layers and images
    target: Tensor  # (K,) int64, index into the objects of all images
    shape: tuple[int, int, int]  # N, B, Q
    num_objects: int  # G

    def iou(self) -> Tensor:
        """(K,) IoU of box and object, without gradient.

        Some published programs add 1e-6 to the union. Then a box of 4 by 4 pixels can't be better than about
        0.94 in an image of 800 by 1333.
        """
        return box_iou(cxcywh_to_xyxy(self.boxes.detach()), cxcywh_to_xyxy(self.true_boxes))

    def best_of_image(self, values: Tensor) -> Tensor:
        """Values (K,), at least 0 -> (K,), for each pair the highest value of its image in its layer."""
        layers, images, queries = self.shape
        image = self.query // queries  # (K,), layer * B + image
        return values.new_zeros(layers * images).scatter_reduce(0, image, values, "amax")[image]

    def object_of_layer(self) -> Tensor:
        """(K,) int64, equal for the pairs of the same object in the same layer: layer * G + object."""
        _, images, queries = self.shape
        return self.query // (images * queries) * self.num_objects + self.target


class FocalLoss(nn.Module):
    """Sigmoid focal loss (RetinaNet, arXiv 1708.02002, eq. 5), with a target of 1 for every positive.

    Args:
        alpha: weight of positives; negatives have 1 - alpha.
        gamma: exponent of the modulating factor.
    """

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def negatives(self, logits: Tensor) -> Tensor:
        """Loss of logits (N, B, Q, C) as if all were negatives -> (N,)."""
        return (1 - self.alpha) * _focal_loss(to_float32(logits), self.gamma).sum((1, 2, 3))

    def targets(self, pairs: Positives) -> Tensor | None:
        """Target (K,) of each positive, without gradient; None for a target of 1."""
        return None

    def positives(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """Loss of each positive with its target, minus its share of `negatives`; any shape."""
        negative = (1 - self.alpha) * _focal_loss(logits, self.gamma)
        positive = self.alpha * _focal_loss(-logits, self.gamma)
        return positive - negative


class QualityLoss(nn.Module):
    """Base of losses whose target is a quality in [0, 1]: cross-entropy with it, times a factor.

    Entropies are computed from logits, so that no logit gives the logarithm of 0.

    Args:
        alpha, gamma: negatives weigh `alpha * p ** gamma`, with their score p.
    """

    def __init__(self, *, alpha: float, gamma: float):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def negatives(self, logits: Tensor) -> Tensor:
        """Loss of logits (N, B, Q, C) as if all were negatives -> (N,)."""
        return self.negative(to_float32(logits)).sum((1, 2, 3))

    def negative(self, logits: Tensor) -> Tensor:
        """Loss of each logit as a negative; any shape."""
        return self.alpha * _focal_loss(logits, self.gamma)

    def targets(self, pairs: Positives) -> Tensor:
        """Target (K,) of each positive, without gradient."""
        raise NotImplementedError

    def positives(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each positive with its target, minus its share of `negatives`; any shape."""
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return self.factor(logits, targets) * entropy - self.negative(logits)

    def factor(self, logits: Tensor, targets: Tensor) -> Tensor | float:
        """Weight of each positive."""
        return 1.0


class IoUAwareLoss(QualityLoss):
    """IA-BCE of Align-DETR (arXiv 2304.07527v1): the target joins score and IoU.

    The target is `score ** score_power * iou ** (1 - score_power)`, at least 0.01.

    Args:
        score_power: alpha of the paper.
        alpha, gamma: negatives weigh `alpha * p ** gamma`.
    """

    def __init__(self, *, score_power: float = 0.25, alpha: float = 1.0, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma)
        self.score_power = score_power

    def targets(self, pairs: Positives) -> Tensor:
        """Target (K,) of each positive, without gradient."""
        scores = pairs.logits.detach().sigmoid()
        return (scores**self.score_power * pairs.iou() ** (1 - self.score_power)).clamp(min=0.01)


class SquaredIoULoss(QualityLoss):
    """Focal loss with the squared IoU as target (position-supervised loss of Stable-DINO, arXiv 2304.04742).

    As in the published program, the targets of an image are scaled so that the best one is 1.

    Args:
        iou_power: exponent of the IoU.
        positive_alpha: weight of positives, whose factor is `positive_alpha * |target - p| ** gamma`.
        alpha, gamma: negatives weigh `alpha * p ** gamma`.
    """

    def __init__(
        self, *, iou_power: float = 2.0, positive_alpha: float = 0.25, alpha: float = 0.75, gamma: float = 2.0
    ):
        super().__init__(alpha=alpha, gamma=gamma)
        self.iou_power = iou_power
        self.positive_alpha = positive_alpha

    def targets(self, pairs: Positives) -> Tensor:
        """Target (K,) of each positive, without gradient."""
        targets = pairs.iou() ** self.iou_power
        return targets / (pairs.best_of_image(targets) + _EPS)

    def factor(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Weight of each positive."""
        return self.positive_alpha * (targets - logits.sigmoid()).abs() ** self.gamma


class VarifocalLoss(QualityLoss):
    """Varifocal loss (VarifocalNet, arXiv 2008.13367, eq. 2): positives weigh their target, the IoU.

    Scores in the weights have no gradient, as in RT-DETR and Relation-DETR.

    Args:
        alpha, gamma: negatives weigh `alpha * p ** gamma`.
    """

    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma)

    def negative(self, logits: Tensor) -> Tensor:
        """Loss of each logit as a negative; any shape."""
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)

    def targets(self, pairs: Positives) -> Tensor:
        """Target (K,) of each positive, without gradient."""
        return pairs.iou()

    def factor(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Weight of each positive."""
        return targets


class MatchabilityLoss(VarifocalLoss):
    """Matchability-aware loss of DEIM (arXiv 2412.04234): the target is `iou ** gamma`, and positives weigh 1.

    Args:
        alpha, gamma: negatives weigh `alpha * p ** gamma`.
    """

    def __init__(self, *, alpha: float = 1.0, gamma: float = 1.5):
        super().__init__(alpha=alpha, gamma=gamma)

    def targets(self, pairs: Positives) -> Tensor:
        """Target (K,) of each positive, without gradient."""
        return pairs.iou() ** self.gamma

    def factor(self, logits: Tensor, targets: Tensor) -> float:
        """Weight of each positive."""
        return 1.0


def _focal_loss(wrong: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss without its weight alpha (RetinaNet, arXiv 1708.02002, eq. 4), of any shape.

    `wrong` is the logit of the wrong answer: for a negative its logit, for a positive the opposite of its logit.
    """
    return wrong.sigmoid() ** gamma * F.softplus(wrong)
