"""Scales losses of a criterion, for recipes that weight sets of predictions unequally."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dino.structures import Outputs, Target

from .criterion import call_criterion


class LossScaling(nn.Module):
    """Multiplies some of the losses of a criterion.

    Args:
        criterion: (Outputs, targets) -> dict of losses, see `SetCriterion`.
        factors: beginning of a loss's name -> factor: `{"loss_ce_dn": 0.5}` halves the class losses of denoising.
    """

    def __init__(self, *, criterion: nn.Module, factors: Mapping[str, float]):
        super().__init__()
        self.criterion = criterion
        self.factors = dict(factors)

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> the criterion's losses, scaled.

        Args:
            outputs, targets, options: arguments of the criterion, see `SetCriterion.forward`.

        Raises:
            ValueError: no loss begins as a key of `factors`.
        """
        losses = call_criterion(self.criterion, outputs, targets, **options)
        for beginning, factor in self.factors.items():
            names = [name for name in losses if name.startswith(beginning)]
            if not names and outputs.denoising:
                raise ValueError(f"no loss begins with {beginning!r}; there are {', '.join(losses)}")
            losses |= {name: factor * losses[name] for name in names}
        return losses


Reweighting = LossScaling  # as older recipes and checkpoints name it
