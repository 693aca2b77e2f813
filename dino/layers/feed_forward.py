"""Two linear layers with ReLU between them, whose hidden state is computed twice instead of kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 1024  # tokens; the hidden state of so many stays in a processor's caches


class FrugalFeedForward(torch.autograd.Function):
    """linear2(relu(linear1(x))) for a CPU, part by part of the tokens.

    Called as `apply(x, weight1, bias1, weight2, bias2)`, all of one dtype: x (B, N, E), weights (F, E), (F,), (E, F)
    and (E,). The usual backward pass keeps the hidden state (B, N, F), which is a third of all that a DINO keeps for
    it. This one needs it for `PART` tokens at a time and pays with one matrix product more in six.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """-> (B, N, E)."""
        ctx.save_for_backward(x, weight1, bias1, weight2)
        parts = x.split(PART, 1)
        return torch.cat([F.linear(hidden_state(part, weight1, bias1), weight2, bias2) for part in parts], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradient (B, N, E) of the result -> those of the five arguments."""
        x, weight1, bias1, weight2 = ctx.saved_tensors
        grad_x, sums = torch.empty_like(x), [torch.zeros_like(t) for t in (weight1, bias1, weight2)]
        for part, grad_part, result in zip(x.split(PART, 1), grad.split(PART, 1), grad_x.split(PART, 1), strict=True):
            hidden = hidden_state(part, weight1, bias1).flatten(0, 1)  # (B*n, F)
            grad_part = grad_part.flatten(0, 1)
            grad_hidden = torch.ops.aten.threshold_backward(grad_part @ weight2, hidden, 0)  # (B*n, F)
            sums[0].addmm_(grad_hidden.t(), part.flatten(0, 1))
            sums[1].add_(grad_hidden.sum(0))
            sums[2].addmm_(grad_part.t(), hidden)
            result.copy_((grad_hidden @ weight1).view_as(result))
        return grad_x, *sums, grad.sum((0, 1))


def hidden_state(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, n, E) -> (B, n, F)."""
    return F.relu(F.linear(x, weight, bias), inplace=True)
