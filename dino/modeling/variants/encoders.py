"""Variants of `Encoder` and `SinePositionEncoding`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.layers.boxes import to_float32
from dino.structures import Tokens

from ..transformer import Encoder

_LIFT = 8.0  # numbers above its opposite pass the ReLU of `DeepFusionEncoder` at the start; states are normalised


class PlacedEncoder(Encoder):
    """Adds the position encoding to the features before the first layer.

    For an encoder without layers: nothing else would read positions and level embeddings. Arguments are those of
    `Encoder`.
    """

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens -> the same with new features."""
        return super().forward(tokens.with_features(tokens.features + tokens.position))


class DenseFusionEncoder(Encoder):
    """Fuses the input and the states of all layers: a linear layer over their channels, and a norm (Stable-DINO).

    At the start the linear layer selects the last state, so that an `Encoder` with the same weights differs by the norm
    alone: that has a mean of 0 and a variance of 1 where the last layer's norm has learned others. (The published
    program starts with random weights.) Padded cells are fused like all others, and never read.

    Memory grows by none of the states: each is multiplied by its part of the weight when it is there, and the products
    are added up. The public programs concatenate all states.

    Args:
        num_layers, embed_dim: as of `Encoder`.
        options: the other arguments of `Encoder`.
    """

    def __init__(self, *, num_layers: int = 6, embed_dim: int = 256, **options: int):
        super().__init__(num_layers=num_layers, embed_dim=embed_dim, **options)
        self.fusion = nn.Linear((num_layers + 1) * embed_dim, embed_dim)
        self.fusion_norm = nn.LayerNorm(embed_dim)
        nn.init.zeros_(self.fusion.weight)
        nn.init.eye_(self.fusion.weight.data[:, -embed_dim:])
        nn.init.zeros_(self.fusion.bias)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens -> the same with new features."""
        memory = super().forward(tokens)
        return memory.with_features(self.fusion_norm(self.finish(memory.features)))

    def fuse(self, memory: Tensor | None, x: Tensor, layer: int) -> Tensor:
        """Add the product of state number `layer` and its part of the weight."""
        weight = self.fusion.weight.unflatten(1, (-1, x.shape[-1]))[:, layer]  # (E, E)
        if memory is None:
            return F.linear(x, weight, self.fusion.bias)
        return torch.addmm(memory.flatten(0, 1), x.flatten(0, 1), weight.T).view_as(x)

    def finish(self, features: Tensor) -> Tensor:
        """What the norm gets, from the sum of all products (B, S, E)."""
        return features


class DeepFusionEncoder(DenseFusionEncoder):
    """`DenseFusionEncoder` with a ReLU and a second linear layer before the norm (Relation-DETR, arXiv 2407.11699).

    At the start the last state passes the ReLU too, but for numbers below -8: the first bias adds 8, and the second one
    takes it away.

    Args:
        num_layers, embed_dim: as of `Encoder`.
        options: the other arguments of `Encoder`.
    """

    def __init__(self, *, num_layers: int = 6, embed_dim: int = 256, **options: int):
        super().__init__(num_layers=num_layers, embed_dim=embed_dim, **options)
        self.fusion_output = nn.Linear(embed_dim, embed_dim)
        nn.init.constant_(self.fusion.bias, _LIFT)
        nn.init.eye_(self.fusion_output.weight)
        nn.init.constant_(self.fusion_output.bias, -_LIFT)

    def finish(self, features: Tensor) -> Tensor:
        """ReLU and the second linear layer."""
        return self.fusion_output(F.relu(features))


class LearnedPositionEncoding(nn.Module):
    """Learned absolute embeddings of rows and columns instead of sines (DETR's appendix, arXiv 2005.12872).

    Locations are relative to the unpadded part of the image, as of `SinePositionEncoding`, and interpolate between the
    two nearest of `num_codes` embeddings. (DETR numbers the cells and fails beyond 50.)

    Args:
        embed_dim: number of channels; the first half encodes y, the second half x.
        num_codes: number of embeddings along each axis.
    """

    def __init__(self, embed_dim: int, *, num_codes: int = 50):
        super().__init__()
        self.rows = nn.Embedding(num_codes, embed_dim // 2)
        self.columns = nn.Embedding(num_codes, embed_dim // 2)
        for codes in (self.rows, self.columns):
            nn.init.uniform_(codes.weight)

    def forward(self, padding_mask: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, E, H, W) float32."""
        valid = ~padding_mask
        codes = []
        for table, axis in ((self.rows, 1), (self.columns, 2)):
            count = valid.cumsum(axis, dtype=torch.float32)  # (B, H, W)
            location = (count - 0.5) / count.amax(axis, keepdim=True).clamp(min=1)
            codes.append(_interpolate(table.weight, location.clamp(min=0)))
        return torch.cat(codes, -1).permute(0, 3, 1, 2)


def _interpolate(codes: Tensor, location: Tensor) -> Tensor:
    """codes (K, D), locations (...) from 0, the first code, to 1, the last -> (..., D) in float32."""
    codes = to_float32(codes)
    scaled = location * (len(codes) - 1)
    low = scaled.floor().clamp(max=len(codes) - 2).long()
    part = (scaled - low)[..., None]
    return codes[low] * (1 - part) + codes[low + 1] * part
