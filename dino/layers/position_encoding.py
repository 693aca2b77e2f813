"""Sine position encodings of cells and of boxes (temperatures as in the released models)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_BOX_TEMPERATURE = 10000.0  # of the decoder's boxes; independent of the encoder's temperature


def _sine_encode(x: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) angles in radians -> (..., dim): sine at even, cosine at odd indices, of falling frequency."""
    index = torch.arange(dim, device=x.device, dtype=torch.float32)
    period = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / dim)
    angle = x[..., None] / period
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


def encode_boxes(boxes: Tensor, dim: int) -> Tensor:
    """(..., 4) boxes cxcywh or (..., 2) points xy in [0,1] -> (..., 4*dim) or (..., 2*dim), in the order y, x, w, h."""
    x, y, *size = (boxes * (2 * math.pi)).unbind(-1)
    return _sine_encode(torch.stack([y, x, *size], -1), dim, _BOX_TEMPERATURE).flatten(-2)


class SinePositionEncoding(nn.Module):
    """Encodes the location of each cell in the unpadded part of its image.

    Args:
        embed_dim: number of channels; the first half encodes y, the second half x.
        temperatures: base of the frequencies for y and for x. Released models use 20; detrex' 12-epoch models 10000.
        offset: added to the 1-based cell index before the division by the extent. detrex' 12-epoch models use -0.5.
    """

    def __init__(self, embed_dim: int, *, temperatures: Sequence[float] = (20.0, 20.0), offset: float = 0.0):
        super().__init__()
        self.dim = embed_dim // 2
        self.temperatures = tuple(temperatures)
        self.offset = offset

    def forward(self, padding_mask: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, E, H, W) float32."""
        valid = ~padding_mask
        y = valid.cumsum(1, dtype=torch.float32)  # (B, H, W)
        x = valid.cumsum(2, dtype=torch.float32)  # (B, H, W)
        y = (y + self.offset) / (y[:, -1:] + 1e-6) * (2 * math.pi)
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        codes = [_sine_encode(c, self.dim, t) for c, t in zip((y, x), self.temperatures, strict=True)]
        return torch.cat(codes, -1).permute(0, 3, 1, 2)
