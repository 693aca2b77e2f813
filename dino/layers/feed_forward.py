"""The feed-forward network of the encoder's and decoder's layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two linear layers with ReLU between them, a residual connection, and a norm after it.

    Args:
        embed_dim: E, width of the tokens.
        hidden_dim: F, width of the hidden state.
    """

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) -> the same shape."""
        # Not in place where there will be a gradient: autograd copies the gradient of a changed view twice.
        hidden = F.relu(self.linear1(x), inplace=not (torch.is_grad_enabled() or torch.jit.is_tracing()))  # (B, N, F)
        return self.norm(x + self.linear2(hidden))
