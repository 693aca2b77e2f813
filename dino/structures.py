"""The values that travel through the detector. Read this file first.

Letters used in every shape comment of the package:

    B images      L feature levels      H, W height and width     S tokens of all levels (sum of H*W)
    E channels of a token (embed_dim)   M attention heads         D channels of one head (E / M)
    P sampling points                   Q queries                 C classes
    N prediction layers                 G ground-truth boxes of one image
    T denoising queries, in front of the Q matching queries       K detections of one image

Boxes are (cx, cy, w, h) as fractions of the unpadded image unless a name says otherwise. Masks are True where something
is padded or forbidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dino.utils.device import recording, to_device

SCORE_THRESH = 0.4  # lowest score of a detection that is drawn or listed, unless somebody says otherwise; AP uses all


class Target(NamedTuple):
    """The objects of one image."""

    labels: Tensor  # (G,) int64, 0 <= label < C
    boxes: Tensor  # (G, 4) float32


class Tokens(NamedTuple):
    """A feature pyramid, flattened over its levels: level after level, row after row."""

    features: Tensor  # (B, S, E)
    position: Tensor  # (B, S, E), sine code of the location plus the embedding of the level
    padding_mask: Tensor | None  # (B, S) bool, True on padded cells; None where no image is padded
    shapes: list[tuple[int, int]]  # L pairs (H, W); Python ints, so that reading them never waits for a device
    valid_sizes: Tensor  # (B, L, 2) float32, width and height of the unpadded part in cells

    @property
    def valid_ratios(self) -> Tensor:
        """(B, L, 2): the unpadded fraction of each level's width and height."""
        return self.valid_sizes / extents(self.shapes, self.valid_sizes)

    def with_features(self, features: Tensor) -> Tokens:
        """Replace the features by (B, S, E). (`_replace` gives an empty tuple where PyTorch 2.11 compiles it.)"""
        return Tokens(features, self.position, self.padding_mask, self.shapes, self.valid_sizes)


def extents(shapes: list[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """L pairs (H, W) -> (L, 2), widths and heights as numbers of the dtype and on the device of `like`.

    A compiled or exported graph would fix the numbers of a list, and be compiled again for every size. So single
    numbers make the tensor there: the graph can leave them open. In a CUDA graph the device makes the tensor.
    """
    if torch.compiler.is_compiling() or recording(like.device):
        return torch.stack([like.new_full((), side) for h, w in shapes for side in (w, h)]).view(-1, 2)
    return to_device([(w, h) for h, w in shapes], like.device, like.dtype)


def at_most(count: int, size: int) -> int:
    """The smaller of the two; a graph that is exported or traced for any size keeps the choice open."""
    return torch.as_tensor(size).clamp(max=count) if torch.jit.is_tracing() else torch.sym_min(count, size)


class Queries(NamedTuple):
    """What the decoder refines."""

    content: Tensor  # (B, Q, E)
    box_logits: Tensor  # (B, Q, 4) float32, the initial boxes before the sigmoid; only learned ones have a gradient
    attn_mask: Tensor | None = None  # (Q, Q) bool, True where a row must not attend to a column


class LayerOutputs(NamedTuple):
    """Class logits and boxes of several layers."""

    logits: Tensor  # (N, B, Q, C), before the sigmoid
    boxes: Tensor  # (N, B, Q, 4) float32

    def split(self, count: int) -> tuple[LayerOutputs, LayerOutputs]:
        """Separate the first `count` queries from the rest."""
        parts = [x.split([count, x.shape[2] - count], 2) for x in self]  # one operation in the backward pass
        head, tail = (LayerOutputs(*pair) for pair in zip(*parts, strict=True))
        return head, tail

    def without_layers(self) -> LayerOutputs:
        """The same shapes, but with N = 0."""
        return LayerOutputs(*(x[:0] for x in self))


class DenoisingQueries(NamedTuple):
    """Denoising queries, and what the criterion needs for their losses."""

    queries: Queries  # Q = T; `attn_mask` covers the T + Q rows of the decoder
    targets: list[Target]  # the denoised objects; fewer than the image has where the budget is exceeded
    num_groups: int  # 0 where no object is denoised: the losses of the single query are then 0


class DenoisingOutputs(NamedTuple):
    """The decoder's predictions for `DenoisingQueries`."""

    predictions: LayerOutputs  # Q = T
    targets: list[Target]
    num_groups: int


class Outputs(NamedTuple):
    """Everything DINO returns."""

    decoder: LayerOutputs  # N decoder layers; the last one is the result
    proposals: LayerOutputs  # N = 1: the encoder's predictions for the selected tokens; N = 0 where none are selected
    denoising: DenoisingOutputs | None = None  # training only
    extra: dict[str, Outputs] | None = None  # training only: predictions of further branches by name


class Detections(NamedTuple):
    """The detections of one image, best first, not clipped. In a batch, all three tensors have B in front."""

    boxes: Tensor  # (K, 4) float32, xyxy in pixels
    scores: Tensor  # (K,) float32 in [0, 1]
    labels: Tensor  # (K,) int64


def separate(predictions: LayerOutputs, denoising: DenoisingQueries) -> tuple[LayerOutputs, DenoisingOutputs]:
    """Predictions for T denoising queries and Q others, in this order -> those of the others, and of denoising."""
    denoised, others = predictions.split(denoising.queries.content.shape[1])
    return others, DenoisingOutputs(denoised, denoising.targets, denoising.num_groups)


def concatenate(first: Queries, second: Queries) -> Queries:
    """Put `first` in front of `second` along Q. The mask is that of `first`, which must cover both."""
    return Queries(
        torch.cat([first.content, second.content], 1),
        torch.cat([first.box_logits, second.box_logits], 1),
        first.attn_mask,
    )
