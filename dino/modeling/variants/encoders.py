"""Variants of `Encoder` and `SinePositionEncoding`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino.layers.boxes import to_float32
from dino.structures import Tokens

from ..transformer import Encoder


class PlacedEncoder(Encoder):
    """Adds the position encoding to the features before the first layer.

    For an encoder without layers: nothing else would read positions and level embeddings. Arguments are those of
    `Encoder`.
    """

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens -> the same with new features."""
        return super().forward(tokens.with_features(tokens.features + tokens.position))


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
