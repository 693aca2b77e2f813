"""Averaged weights: they often detect better than those of the last step, especially early in a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino.weights import to_current_names

from .shards import local, shard_like


class Ema:
    """Exponential moving average of all trainable parameters and of the running statistics of norms.

    A parameter that several modules share is averaged once per step. The decay starts low, as (1 + n) / (10 + n)
    after n updates, so that the random start soon loses its weight.

    Args:
        model: holds the weights to average; not wrapped by DistributedDataParallel.
        decay: of the average, for many updates.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.updates = 0
        self.current = _averageable(model)
        self.averaged = [x.detach().clone() for x in self.current]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)([local(x) for x in self.averaged], [local(x) for x in self.current], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the averaged weights within the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the weights of the model and the averages, in place: optimizers keep the same parameters."""
        for x, y in zip(self.averaged, self.current, strict=True):
            averaged = local(x).clone()
            local(x).copy_(local(y))
            local(y).copy_(averaged)

    def state_dict(self) -> dict:
        """The averaged weights as a state dict of the model, and the number of updates."""
        averages = {id(now): mean for now, mean in zip(self.current, self.averaged, strict=True)}
        weights = {key: averages.get(id(x), x).detach() for key, x in self.model.state_dict(keep_vars=True).items()}
        return {"model": weights, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore the averages and the number of updates."""
        names = {id(x): key for key, x in self.model.state_dict(keep_vars=True).items()}
        weights = to_current_names(state["model"])
        for now, mean in zip(self.current, self.averaged, strict=True):
            local(mean).copy_(local(shard_like(weights[names[id(now)]], mean)))
        self.updates = state["updates"]


def _averageable(model: nn.Module) -> list[Tensor]:
    """Trainable parameters and saved floating-point buffers, each tensor once."""
    saved = {id(x) for x in model.state_dict(keep_vars=True).values()}
    buffers = [x for x in model.buffers() if x.is_floating_point() and id(x) in saved]
    return [x for x in model.parameters() if x.requires_grad] + buffers
