"""Variants of DINO's parts, from its ancestors and for ablations. Each class replaces the part of the same signature.

In a recipe, `model.network.decoder._target_ = LookForwardOnce` is enough; projects/dino/configs/ablation uses them all.
Two variants need no class: `num_denoising=0` switches denoising off, and `num_classes=1` makes `QuerySelection` score
whether a token holds any object at all (with the losses of `ObjectnessCriterion`).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from dino.layers.boxes import to_float32
from dino.layers.criterion import SetCriterion
from dino.layers.denoising import ContrastiveDenoising, Noise
from dino.structures import LayerOutputs, Outputs, Queries, Target, Tokens

from .transformer import Decoder, Encoder, QuerySelection

__all__ = [
    "FinalCriterion",
    "LearnedPositionEncoding",
    "LearnedQueries",
    "LookForwardOnce",
    "ObjectnessCriterion",
    "PatternSelection",
    "PlacedEncoder",
    "PositiveDenoising",
    "PureSelection",
    "SeparateCriterion",
    "ShiftDenoising",
]

_AUXILIARY = re.compile(r"loss_[a-z]+(_dn)?_\d+")  # names of the losses of all decoder layers but the last


# Query selection: replaces `QuerySelection`


class LearnedQueries(nn.Module):
    """Static queries: boxes and contents are learned, the same for all images (DAB-DETR, arXiv 2201.12329).

    The encoder proposes nothing, so there are no `_interm` losses. Anchors are initialised as DAB-DETR's, from a normal
    distribution in logit space: large boxes around the middle. Unlike selected boxes, they have a gradient.

    Args:
        num_queries: Q, candidates of an image.
        num_classes, embed_dim: C; E, width of the tokens.
    """

    def __init__(self, *, num_queries: int, num_classes: int, embed_dim: int = 256):
        super().__init__()
        self.num_queries = num_queries
        self.num_classes = num_classes
        self.anchors = nn.Embedding(num_queries, 4)
        self.content = nn.Embedding(num_queries, embed_dim)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Tokens) -> tuple[Queries, LayerOutputs]:
        """Memory -> the same Q queries for every image, and predictions of no layer (N = 0)."""
        images = memory.features.shape[0]
        content = self.content.weight.expand(images, -1, -1)  # (B, Q, E)
        box_logits = to_float32(self.anchors.weight).expand(images, -1, -1)  # (B, Q, 4)
        logits = content.new_zeros(0, images, self.num_queries, self.num_classes)
        return Queries(content, box_logits), LayerOutputs(logits, box_logits.new_zeros(0, *box_logits.shape))


class PureSelection(QuerySelection):
    """Pure query selection: boxes and contents come from the best tokens (the paper's figure 5 b).

    Contents are the tokens' features without gradient, as in the official program with `embed_init_tgt=False`.
    Two-stage Deformable DETR selects the same way, but encodes contents from the box. Arguments are those of
    `QuerySelection`.
    """

    def __init__(self, *, num_queries: int, num_classes: int, embed_dim: int = 256, anchor_size: float = 0.05):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim, anchor_size=anchor_size)
        del self.content  # nothing would train it

    def contents(self, features: Tensor) -> Tensor:
        """The features (B, Q, E) themselves."""
        return features.detach()


class PatternSelection(PureSelection):
    """Several queries for each selected box, with learned patterns as contents (Anchor DETR, arXiv 2109.07107).

    All boxes share the patterns. There are more queries than proposals: use `SeparateCriterion`.

    Args:
        num_queries: number of selected boxes; the decoder gets `num_patterns` queries for each.
        num_classes, embed_dim, anchor_size: as of `QuerySelection`.
        num_patterns: number of contents for each box.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        num_classes: int,
        embed_dim: int = 256,
        anchor_size: float = 0.05,
        num_patterns: int = 3,
    ):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim, anchor_size=anchor_size)
        self.patterns = nn.Embedding(num_patterns, embed_dim)
        nn.init.xavier_uniform_(self.patterns.weight)

    def forward(self, memory: Tokens) -> tuple[Queries, LayerOutputs]:
        """Memory -> num_patterns * Q queries, all boxes with the first pattern in front; and Q proposals."""
        queries, proposals = super().forward(memory)
        images, count, _ = queries.box_logits.shape
        content = self.patterns.weight[:, None].expand(-1, count, -1).flatten(0, 1).expand(images, -1, -1)
        return Queries(content, queries.box_logits.repeat(1, len(self.patterns.weight), 1)), proposals


# Denoising: replaces `ContrastiveDenoising`


class PositiveDenoising(ContrastiveDenoising):
    """Denoising without negatives (DN-DETR, arXiv 2203.01305): a group holds one positive for each object.

    Groups, mask, budget and noise are those of `ContrastiveDenoising`: only the negatives differ. (DN-DETR itself has 5
    groups, and shifts and scales boxes instead of moving their corners.)
    """

    KINDS = 1


class ShiftDenoising(ContrastiveDenoising):
    """Contrastive denoising whose negatives are shifted boxes of the object's own size.

    The centre (cx, cy) moves to (cx + sx (1 + ux) box_noise w/2, cy + sy (1 + uy) box_noise h/2), with signs sx, sy
    and ux, uy uniform in [0, 1): along each axis by one to two half sides, at a `box_noise` of 1. So a negative covers
    at most a quarter of the object, its IoU is at most 1/7, and no side is below 0. Corners are then clamped to the
    image. Positives are those of `ContrastiveDenoising`.
    """

    def steps(self, noise: Noise) -> Tensor:
        """(R, K, 4): shift of each number of (x0, y0, x1, y1) in half sides, equal for both corners of a negative."""
        steps = super().steps(noise)
        steps[1::2, :, 2:] = steps[1::2, :, :2]
        return steps


# Refinement and position encoding: replaces `Decoder`, `Encoder`, `SinePositionEncoding`


class LookForwardOnce(Decoder):
    """Look forward once: layer i refines the boxes that it read, without their gradient (Deformable DETR).

    The loss of layer i then trains the box head of layer i alone, as with `use_detached_boxes_dec_out=True` of the
    official program. Arguments are those of `Decoder`.
    """

    def look_forward(self, boxes: Tensor) -> Tensor:
        """The boxes without gradient."""
        return boxes.detach()


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


# Losses: replaces `SetCriterion`


class FinalCriterion(SetCriterion):
    """Without auxiliary losses: only the last decoder layer and the proposals have losses.

    The auxiliary losses keep their names and are 0, as are the gradients of the heads that nothing else trains. So all
    parameters stay in the graph, which distributed training needs. Arguments are those of `SetCriterion`.
    """

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars. `options` are those of `SetCriterion.forward`."""
        losses = super().forward(outputs, targets, **options)
        return {name: 0 * loss if _AUXILIARY.fullmatch(name) else loss for name, loss in losses.items()}


class SeparateCriterion(SetCriterion):
    """Matches the encoder's proposals separately, so that their number may differ from that of the decoder's queries.

    Names and weights of the losses and the arguments are those of `SetCriterion`.
    """

    def forward(self, outputs: Outputs, targets: list[Target], **options: Any) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars. `options` are those of `SetCriterion.forward`."""
        losses = super().forward(outputs._replace(proposals=_no_layers(outputs.decoder)), targets, **options)
        proposed = Outputs(outputs.proposals, _no_layers(outputs.proposals))
        targets = [self.proposal_target(target) for target in targets]
        proposal_losses = super().forward(proposed, targets, **options)
        return losses | {f"{name}_interm": loss for name, loss in proposal_losses.items()}

    def proposal_target(self, target: Target) -> Target:
        """The ground truth of the proposals of an image."""
        return target


class ObjectnessCriterion(SeparateCriterion):
    """Class-agnostic losses of the proposals, for a `QuerySelection` with `num_classes=1`.

    Two-stage Deformable DETR (arXiv 2010.04159) predicts an objectness and a box for each token. (Its losses are for
    all tokens, these for the selected ones, as DINO's.)
    """

    def proposal_target(self, target: Target) -> Target:
        """The same objects, all of class 0."""
        return target._replace(labels=torch.zeros_like(target.labels))


def _no_layers(predictions: LayerOutputs) -> LayerOutputs:
    """The same shape, but with N = 0."""
    return LayerOutputs(*(x[:0] for x in predictions))
