"""The feed-forward network for a CPU: in parts of the tokens, half of whose hidden state is recomputed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .feed_forward import FeedForward

_PART = 1024  # tokens; the hidden state of so many stays in a processor's caches
_KEPT = 0.5  # of the parts keep their hidden state


class CpuFeedForward(FeedForward):
    """A `FeedForward` that works in parts of `_PART` tokens: faster on a CPU, with less memory.

    Compiled code, training under autocast, and at most `_PART` tokens take the plain operations.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) -> the same shape."""
        plain, trains = super().forward, torch.is_grad_enabled()
        seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if seen or x.shape[1] <= _PART or (trains and torch.is_autocast_enabled("cpu")):
            return plain(x)
        if not trains:
            return torch.cat([plain(part) for part in x.split(_PART, 1)], 1)
        args = (self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)
        return self.norm(x + _RecomputedFeedForward.apply(x, *args))


class _RecomputedFeedForward(torch.autograd.Function):
    """linear2(relu(linear1(x))) in parts of the tokens.

    Called as `apply(x, weight1, bias1, weight2, bias2)`, all of one dtype: x (B, N, E), weights (F, E), (F,), (E, F)
    and (E,). The hidden state (B, N, F) is a third of all activations that a DINO keeps for its backward pass. Half of
    the parts keep it here. The other half recomputes it, at the cost of one matrix product more in twelve; working in
    parts gains more than that.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """-> (B, N, E)."""
        parts = x.split(_PART, 1)
        results, kept = [], []
        for number, part in enumerate(parts):
            hidden = _hidden_state(part, weight1, bias1)
            results.append(F.linear(hidden, weight2, bias2))
            if number < _KEPT * len(parts):
                kept.append(hidden)
        ctx.save_for_backward(x, weight1, bias1, weight2, *kept)
        return torch.cat(results, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradient (B, N, E) of the result -> those of the five arguments."""
        x, weight1, bias1, weight2, *kept = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), [torch.zeros_like(t) for t in (weight1, bias1, weight2)]
        parts = zip(x.split(_PART, 1), grad.split(_PART, 1), grad_x.split(_PART, 1), strict=True)
        for number, (part, grad_part, result) in enumerate(parts):
            hidden = kept[number] if number < len(kept) else _hidden_state(part, weight1, bias1)  # (B, n, F)
            hidden, part, grad_part = (t.flatten(0, 1) for t in (hidden, part, grad_part))  # (B*n, ·)
            grad_hidden = torch.ops.aten.threshold_backward(grad_part @ weight2, hidden, 0)  # (B*n, F)
            sums[0].addmm_(grad_hidden.t(), part)
            sums[1].add_(grad_hidden.sum(0))
            sums[2].addmm_(grad_part.t(), hidden)
            result.copy_((grad_hidden @ weight1).view_as(result))
        return grad_x, *sums, grad.sum((0, 1))


def _hidden_state(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, n, E) -> (B, n, F)."""
    return F.relu(F.linear(x, weight, bias), inplace=True)


def use_cpu_feed_forward(model: nn.Module) -> int:
    """Replace every `FeedForward` inside `model` by a `CpuFeedForward` with the same parameters, in place.

    Call it for a model on a CPU, before activation checkpointing and before the model is wrapped for several processes.

    Returns:
        the number of modules that were replaced.
    """
    return replace_modules(model, lambda module: CpuFeedForward if type(module) is FeedForward else None)


def replace_modules(model: nn.Module, choose: Callable[[nn.Module], type[nn.Module] | None]) -> int:
    """Replace modules inside `model` by modules of other classes with the same content, in place.

    The new modules hold the very parameters, buffers, children and hooks of the old ones. State dicts, optimizers and
    averages of weights stay valid. A module that stands in several places is still one module.

    Args:
        model: is itself not replaced.
        choose: module -> the class that replaces its own, or None.

    Returns:
        the number of modules that were replaced.
    """
    replaced = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = choose(module) if name else None
        if kind is not None:
            if module not in replaced:
                replaced[module] = as_kind(module, kind)
            model.set_submodule(name, replaced[module])
    return len(replaced)


def as_kind(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of class `kind` that shares all that `module` holds."""
    made = kind.__new__(kind)
    vars(made).update(vars(module))
    return made
