"""Encoder and decoder with dropout, and with other activations than ReLU (`dropout`, `transformer_activation`).

Places of the dropout are those of the official program, hence of DETR: what each attention reads, the weights of the
self-attention, the hidden state of a feed-forward network and its result. The published models have none.

Parameters, their names and their initial values are those of `Encoder` and `Decoder`: weights load into either. A CPU
runs the feed-forward networks by the plain operations, as its faster ones know ReLU without dropout only.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dino.layers.cpu_feed_forward import replace_modules
from dino.layers.deform_attn import MultiScaleDeformableAttention
from dino.layers.feed_forward import FeedForward

from ..transformer import Attend, Decoder, Encoder, SelfAttention, share_heads

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "selu": F.selu}


class DropoutEncoder(Encoder):
    """An `Encoder` with dropout and any activation.

    Args:
        dropout: chance in [0, 1) of a number to become 0 in training.
        activation: of the feed-forward networks: `relu`, `gelu` or `selu`.
        options: arguments of `Encoder`.

    Raises:
        ValueError: another activation, or no such chance.
    """

    def __init__(self, *, dropout: float = 0.1, activation: str = "relu", **options: int):
        super().__init__(**options)
        _add_dropout(self, dropout, activation)


class DropoutDecoder(Decoder):
    """A `Decoder` with dropout and any activation.

    Args:
        dropout, activation: as of `DropoutEncoder`, with the same errors.
        options: arguments of `Decoder`; the `Attend` of an `Interaction` must take `dropout_p`, as PyTorch's does.
    """

    def __init__(self, *, dropout: float = 0.1, activation: str = "relu", **options: int):
        super().__init__(**options)
        _add_dropout(self, dropout, activation)


class SharedHeadsDropoutDecoder(DropoutDecoder):
    """A `DropoutDecoder` whose layers all use one pair of heads, as in the official program.

    Arguments are those of `DropoutDecoder`.
    """

    def __init__(self, **options):
        super().__init__(**options)
        share_heads(self)


class _DeformableAttention(MultiScaleDeformableAttention):
    dropout: float

    def forward(self, *inputs) -> Tensor:
        """See `MultiScaleDeformableAttention.forward`."""
        return F.dropout(super().forward(*inputs), self.dropout, self.training)


class _SelfAttention(SelfAttention):
    def forward(self, x: Tensor, position: Tensor, attend: Attend) -> Tensor:
        """x and position (B, Q, E) -> (B, Q, E)."""
        if self.training and self.dropout:
            attend = partial(attend, dropout_p=self.dropout)
        return F.dropout(super().forward(x, position, attend), self.dropout, self.training)


class _FeedForward(FeedForward):
    activation: str

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) -> the same shape."""
        hidden = F.dropout(_ACTIVATIONS[self.activation](self.linear1(x)), self.dropout, self.training)  # (B, N, F)
        return self.norm(x + F.dropout(self.linear2(hidden), self.dropout, self.training))


_KINDS = {
    MultiScaleDeformableAttention: _DeformableAttention,
    SelfAttention: _SelfAttention,
    FeedForward: _FeedForward,
}


def _add_dropout(part: nn.Module, dropout: float, activation: str) -> None:
    """Replace the modules of a new encoder or decoder that have dropout or an activation, in place."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(_ACTIVATIONS)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, but a number from 0 to below 1 was expected")
    replace_modules(part, lambda module: _KINDS.get(type(module)))
    for module in part.modules():
        if type(module) in _KINDS.values():
            module.dropout, module.activation = dropout, activation
