"""Two linear layers with ReLU between them, half of whose hidden state is computed twice instead of kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 1024  # tokens; the hidden state of so many stays in a processor's caches
KEPT = 0.5  # of the parts keep their hidden state


class RecomputedFeedForward(torch.autograd.Function):
    """linear2(relu(linear1(x))) for a CPU, part by part of the tokens.

    Called as `apply(x, weight1, bias1, weight2, bias2)`, all of one dtype: x (B, N, E), weights (F, E), (F,), (E, F)
    and (E,). The hidden state (B, N, F) is a third of all that a DINO keeps for its backward pass. Here it is kept for
    one half of the parts and computed again for the others, which costs one matrix product more in twelve; what
    working in parts gains pays for it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """-> (B, N, E)."""
        parts = x.split(PART, 1)
        results, kept = [], []
        for number, part in enumerate(parts):
            hidden = hidden_state(part, weight1, bias1)
            results.append(F.linear(hidden, weight2, bias2))
            if number < KEPT * len(parts):
                kept.append(hidden)
        ctx.save_for_backward(x, weight1, bias1, weight2, *kept)
        return torch.cat(results, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradient (B, N, E) of the result -> those of the five arguments."""
        x, weight1, bias1, weight2, *kept = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), [torch.zeros_like(t) for t in (weight1, bias1, weight2)]
        parts = zip(x.split(PART, 1), grad.split(PART, 1), grad_x.split(PART, 1), strict=True)
        for number, (part, grad_part, result) in enumerate(parts):
            hidden = kept[number] if number < len(kept) else hidden_state(part, weight1, bias1)  # (B, n, F)
            hidden, part, grad_part = (t.flatten(0, 1) for t in (hidden, part, grad_part))  # (B*n, ·)
            grad_hidden = torch.ops.aten.threshold_backward(grad_part @ weight2, hidden, 0)  # (B*n, F)
            sums[0].addmm_(grad_hidden.t(), part)
            sums[1].add_(grad_hidden.sum(0))
            sums[2].addmm_(grad_part.t(), hidden)
            result.copy_((grad_hidden @ weight1).view_as(result))
        return grad_x, *sums, grad.sum((0, 1))


def hidden_state(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, n, E) -> (B, n, F)."""
    return F.relu(F.linear(x, weight, bias), inplace=True)
