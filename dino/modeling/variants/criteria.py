"""Variants of `SetCriterion`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino.layers.class_loss import Positives, QualityLoss
from dino.layers.criterion import SetCriterion, call_criterion
from dino.layers.matcher import check_copies
from dino.structures import Outputs, Target
from dino.utils.files import UserError

_TAKEN = re.compile(r"(interm|dn|(dn_)?\d+)(_.*)?")  # what may follow `loss_ce_` in names of losses without a branch
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
        if not len(outputs.proposals.logits):
            return losses
        proposed = Outputs(outputs.proposals, outputs.proposals.without_layers())
        targets = [self.proposal_target(target) for target in targets]
        proposal_losses = super().forward(proposed, targets, **{**options, "metrics": None})
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
        arguments: of `SetCriterion`.

    Raises:
        UserError: the matcher takes no `copies`, or `copies` is no positive integer.
    """

    def __init__(self, *, copies: int = 6, **arguments: Any):
        super().__init__(**arguments)
        check_copies(self.matcher)
        _check_positive(self, copies=copies)
        self.num_copies = copies

    def copies(self, num_layers: int, num_proposals: int) -> list[int]:
        """The same for all layers."""
        return [self.num_copies] * (num_layers + num_proposals)

    def divisor(self, num_objects: Tensor) -> Tensor:
        """The number of objects times that of their copies."""
        return num_objects * self.num_copies


class RankedCriterion(SetCriterion):
    """Weighs the pairs of each object by their rank (prime sample weighting of Align-DETR, arXiv 2304.07527).

    The pairs of an object in a layer are ranked by the target of the class loss; number r, from 0, has the weight
    `exp(-r / temperature)` in all three losses. The matcher decides how many there are: DAC-DETR has such losses with
    a `ThresholdMatcher` and an `objects_factor` of 3. Denoising has no such weights.

    Args:
        class_loss: one with a quality as target, such as `IoUAwareLoss`.
        temperature: tau of the paper.
        objects_factor: factor of the number of objects, by which the losses are divided.
        arguments: of `SetCriterion`.

    Raises:
        UserError: the class loss has no quality to rank by.
    """

    def __init__(
        self,
        *,
        class_loss: nn.Module | None = None,
        temperature: float = 1.5,
        objects_factor: float = 1.0,
        **arguments: Any,
    ):
        super().__init__(class_loss=class_loss, **arguments)
        if not isinstance(class_loss, QualityLoss):
            raise UserError(
                f"{type(self.class_loss).__name__} has no quality to rank the predictions of an object by: "
                f"{type(self).__name__} needs a QualityLoss, such as IoUAwareLoss"
            )
        _check_positive(self, temperature=temperature, objects_factor=objects_factor)
        self.temperature = temperature
        self.factor = objects_factor

    def divisor(self, num_objects: Tensor) -> Tensor:
        """The number of objects times the factor."""
        return num_objects * self.factor

    def pair_weights(self, quality: Tensor, pairs: Positives) -> Tensor:
        """Weights (K,) by the rank of each pair among those of its object in its layer."""
        return torch.exp(-_rank(quality, pairs.object_of_layer()) / self.temperature)


class MixedMatchingCriterion(RankedCriterion):
    """Several predictions for each object in the early layers and the encoder, one in the last (Align-DETR).

    (Mixed matching and prime sample weighting, arXiv 2304.07527v1.) With one copy it is `SetCriterion`.

    Args:
        copies: predictions of each object in all layers but the last; fewer for an image with many objects.
        arguments: of `RankedCriterion`.

    Raises:
        UserError: the class loss has no quality to rank by, or the matcher takes no `copies`.
    """

    def __init__(self, *, copies: int = 2, **arguments: Any):
        super().__init__(**arguments)
        check_copies(self.matcher)
        _check_positive(self, copies=copies)
        self.num_copies = copies

    def copies(self, num_layers: int, num_proposals: int) -> list[int]:
        """One in the last layer of the decoder."""
        return [*[self.num_copies] * (num_layers - 1), 1, *[self.num_copies] * num_proposals]


def _check_positive(criterion: nn.Module, **numbers: float) -> None:
    """Raise a UserError where a number is not above 0, or `copies` not whole: losses would be infinite or reversed."""
    for name, number in numbers.items():
        if not number > 0 or (name == "copies" and number != int(number)):
            raise UserError(f"{type(criterion).__name__}: {name} is {number}, a positive number was expected")


def check_criterion(criterion: nn.Module, network: nn.Module) -> None:
    """Check that a criterion fits a network. Parts of the criterion are searched, so wrappers need nothing for it.

    The attribute `branches` of a criterion names the branches of the network that it has losses for; without it, there
    are none. Proposals of other numbers or classes than the decoder's predictions need a criterion that matches them
    apart; a criterion with a `forward` of its own is supposed to.

    Raises:
        UserError: the network has other branches, or proposals that `SetCriterion` can't match.
    """
    parts = [*criterion.modules()] if isinstance(criterion, nn.Module) else [criterion]
    _check_branches(parts, getattr(network, "branches", ()))
    main = next((part for part in parts if isinstance(part, SetCriterion)), None)
    needed = _criterion_of_proposals(network)
    if needed and main and type(main).forward is SetCriterion.forward:
        raise UserError(f"proposals differ from the decoder's predictions in number or classes: use {needed}")


def _check_branches(criteria: list, branches: Collection[str]) -> None:
    """Raise a UserError where none of `criteria` names these branches: they would be computed for nothing."""
    named = next((part.branches for part in criteria if hasattr(part, "branches")), ())
    if set(named) != set(branches):
        raise UserError(
            f"the network has the branches {sorted(branches)}, but the criterion losses for {sorted(named)}. "
            "CombinedCriterion adds losses of branches; a criterion of your own names them in its attribute `branches`"
        )


def _criterion_of_proposals(network: nn.Module) -> str:
    """Name of the criterion that a network's proposals need, if `SetCriterion` can't match them."""
    selection, decoder = (getattr(network, name, None) for name in ("query_selection", "decoder"))
    heads = (getattr(selection, "class_head", None), *getattr(decoder, "class_heads", ()))
    if len({head.out_features for head in heads if isinstance(head, nn.Linear)}) > 1:
        return "ObjectnessCriterion"
    return "SeparateCriterion" if hasattr(selection, "patterns") else ""


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
    """Adds the losses of a network's branches; `loss_ce_0` of the branch `hybrid` is `loss_ce_0_hybrid`.

    Args:
        criterion: of the main predictions, see `SetCriterion`.
        branches: criterion of each branch by name, such as `OneToManyCriterion`.
        weights: factor of all losses of a branch by name; 1 by default.

    Raises:
        UserError: a name of `weights` is no branch, or losses of a branch would have names of the main losses.
    """

    def __init__(
        self, *, criterion: nn.Module, branches: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None
    ):
        super().__init__()
        self.criterion = criterion
        self.branches = nn.ModuleDict(branches)
        self.weights = dict(weights or {})
        for name in self.weights.keys() - self.branches.keys():
            raise UserError(f"weights has {name!r}, but the branches are {[*self.branches]}")
        for name in filter(_TAKEN.fullmatch, self.branches):
            raise UserError(f"a branch can't be called {name!r}: the main losses have names such as loss_ce_{name}")

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars. `options` are those of `SetCriterion.forward`.

        Raises:
            UserError: the network has other branches.
        """
        extra = outputs.extra or {}
        _check_branches([self], extra)
        losses = call_criterion(self.criterion, outputs, targets, **options)
        for name, criterion in self.branches.items():
            found = call_criterion(criterion, extra[name], targets, **{**options, "metrics": None})
            losses |= {f"{key}_{name}": self.weights.get(name, 1.0) * value for key, value in found.items()}
        return losses
