"""Multi-scale deformable attention, the module (Deformable DETR, arXiv 2010.04159, eq. 3)."""

import math

import torch
from torch import Tensor, nn

from dino.structures import extents

from .ops.operator import deform_attn, deform_attn_fused, use_compiled
from .ops.reference import Shapes


class MultiScaleDeformableAttention(nn.Module):
    """Each query reads a few points around its reference point or box, on every level.

    Args:
        embed_dim: channels of queries and values; a multiple of `num_heads`.
        num_heads, num_levels, num_points: M, L and P.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial offsets: head m looks in direction m of M, its point p at a distance of p + 1 cells."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)[:, None]  # (P, 1)
        offsets = direction[:, None, None] * distance  # (M, 1, P, 2)
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, padding: Tensor | None, shapes: Shapes
    ) -> Tensor:
        """Attend from each query to the pyramid.

        Args:
            query: (B, Q, E).
            reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes (cx, cy, w, h), as fractions of each padded level.
            value: (B, S, E).
            padding: (B, S) bool, True on cells that read as zeros; None for no such cells.
            shapes: L pairs (H, W).

        Returns:
            (B, Q, E).
        """
        samples = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)  # (B, Q, M, L, P)
        value = self.value_proj(value)
        if padding is not None:
            fill = Tensor.masked_fill if torch.is_grad_enabled() or torch.jit.is_tracing() else Tensor.masked_fill_
            value = fill(value, padding[..., None], 0)  # not in place for gradients, see FeedForward.forward
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D)
        logits = self.attention_weights(query).view(*samples[:3], -1)  # (B, Q, M, L*P)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        if use_compiled(value.device):
            return self.output_proj(deform_attn_fused(value, shapes, offsets, logits, reference))
        weights = logits.softmax(-1).view(samples)
        locations = self.sampling_locations(reference[:, :, None, :, None], offsets.to(reference.dtype), shapes)
        return self.output_proj(deform_attn(value, shapes, locations, weights))

    def sampling_locations(self, reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
        """Offsets in cells around a point, or in P-ths of a half side around a box -> locations (B, Q, M, L, P, 2)."""
        if reference.shape[-1] == 2:
            return reference + offsets / extents(shapes, offsets)[:, None]
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
