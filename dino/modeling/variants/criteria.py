"""Variants of `SetCriterion`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino.layers.class_loss import Positives, QualityLoss
from dino.layers.criterion import SetCriterion, call_criterion
from dino.structures import Outputs, Target
from dino.utils.files import UserError

_AUXILIARY = re.compile(r"loss_[a-z]+(_dn)?_\d+")  # names of the losses of all decoder layers but the last


class FinalCriterion(SetCriterion):
    """Without auxiliary losses: only the last decoder layer and the proposals have losses.

    The auxiliary losses keep their names and are 0, as are the gradients of the heads that nothing else trains. So all
    parameters stay in the graph, which distributed training needs. Arguments are those of `SetCriterion`.
    """

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars. `options` are those of `SetCriterion.forward`."""
        losses = super().forward(outputs, targets, **options)
        return {name: 0 * loss if _AUXILIARY.fullmatch(name) else loss for name, loss in losses.items()}


class SeparateCriterion(SetCriterion):
    """Matches the encoder's proposals separately, so that their number may differ from that of the decoder's queries.

    Names and weights of the losses and the arguments are those of `SetCriterion`.
    """

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars. `options` are those of `SetCriterion.forward`."""
        losses = super().forward(outputs._replace(proposals=outputs.decoder.without_layers()), targets, **options)
        proposed = Outputs(outputs.proposals, outputs.proposals.without_layers())
        targets = [self.proposal_target(target) for target in targets]
        proposal_losses = super().forward(proposed, targets, **options)
        return losses | {f"{name}_interm": loss for name, loss in proposal_losses.items()}

    def proposal_target(self, target: Target) -> Target:
        """The ground truth of the proposals of an image."""
        return target


class ObjectnessCriterion(SeparateCriterion):
    """Class-agnostic losses of the proposals, for a `QuerySelection` with `num_classes=1`.

    Two-stage Deformable DETR (arXiv 2010.04159) predicts an objectness and a box for each token. (Its losses are for
    all tokens, these for the selected ones, as DINO's.)
    """

    def proposal_target(self, target: Target) -> Target:
        """The same objects, all of class 0."""
        return target._replace(labels=torch.zeros_like(target.labels))


class OneToManyCriterion(SetCriterion):
    """Losses of a branch that matches several predictions to each object, all with the same weight.

    Args:
        copies: predictions of each object (k of H-DETR); fewer for an image with many objects, see `HungarianMatcher`.
        objects_factor: factor of the number of objects, by which the losses are divided; `copies` by default.
        arguments: of `SetCriterion`.
    """

    def __init__(self, *, copies: int = 6, objects_factor: float | None = None, **arguments: Any):
        super().__init__(**arguments)
        self.num_copies = copies
        self.factor = copies if objects_factor is None else objects_factor

    def copies(self, num_layers: int, num_proposals: int) -> list[int]:
        """The same for all layers."""
        return [self.num_copies] * (num_layers + num_proposals)

    def divisor(self, num_objects: Tensor) -> Tensor:
        """The number of objects times the factor."""
        return num_objects * self.factor


class MixedMatchingCriterion(SetCriterion):
    """Several predictions for each object in the early layers and the encoder, one in the last (Align-DETR).

    The pairs of an object are ranked by the target of the class loss; number r, from 0, has the weight
    `exp(-r / temperature)` in all three losses (mixed matching and prime sample weighting, arXiv 2304.07527v1). With
    one copy it is `SetCriterion`.

    Args:
        class_loss: one with a quality as target, such as `IoUAwareLoss`.
        copies: predictions of each object in all layers but the last; fewer for an image with many objects.
        temperature: tau of the paper.
        arguments: of `SetCriterion`.

    Raises:
        UserError: the class loss has no quality to rank by.
    """

    def __init__(self, *, class_loss: nn.Module, copies: int = 2, temperature: float = 1.5, **arguments: Any):
        super().__init__(class_loss=class_loss, **arguments)
        if not isinstance(class_loss, QualityLoss):
            raise UserError(
                f"{type(class_loss).__name__} has no quality to rank the predictions of an object by: "
                "MixedMatchingCriterion needs a QualityLoss, such as IoUAwareLoss"
            )
        self.num_copies = copies
        self.temperature = temperature

    def copies(self, num_layers: int, num_proposals: int) -> list[int]:
        """One in the last layer of the decoder."""
        return [*[self.num_copies] * (num_layers - 1), 1, *[self.num_copies] * num_proposals]

    def pair_weights(self, quality: Tensor, pairs: Positives) -> Tensor:
        """Weights (K,) by the rank of each pair among those of its object in its layer."""
        return torch.exp(-_rank(quality, pairs.object_of_layer()) / self.temperature)


def _rank(values: Tensor, group: Tensor) -> Tensor:
    """Values (K,) -> the rank (K,), from 0 for the highest, among those of the same group; ties keep their order."""
    order = values.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # group after group, in each the highest value first
    group = group[order]
    position = torch.arange(len(order), device=order.device)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    first = torch.where(starts, position, 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, position - first)


class CombinedCriterion(nn.Module):
    """Adds the losses of a network's branches; `loss_ce` of the branch `hybrid` is `loss_ce_hybrid`.

    Args:
        criterion: of the main predictions, see `SetCriterion`.
        branches: criterion of each branch by name, such as `OneToManyCriterion`.
        weights: factor of all losses of a branch by name; 1 by default.
    """

    def __init__(
        self, *, criterion: nn.Module, branches: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None
    ):
        super().__init__()
        self.criterion = criterion
        self.branches = nn.ModuleDict(branches)
        self.weights = dict(weights or {})

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars. `options` are those of `SetCriterion.forward`.

        Raises:
            UserError: the network has other branches.
        """
        extra = outputs.extra or {}
        if extra.keys() != self.branches.keys():
            raise UserError(f"the network has the branches {[*extra]}, the criterion losses for {[*self.branches]}")
        losses = call_criterion(self.criterion, outputs, targets, **options)
        for name, criterion in self.branches.items():
            found = call_criterion(criterion, extra[name], targets, **options)
            losses |= {f"{key}_{name}": self.weights.get(name, 1.0) * value for key, value in found.items()}
        return losses
