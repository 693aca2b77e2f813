"""Variants of `QuerySelection`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dino.layers.boxes import box_iou, cxcywh_to_xyxy, to_float32
from dino.structures import LayerOutputs, Queries, Tokens, at_most

from ..transformer import QuerySelection

_LARGEST_SIDE = 0.995  # of a learned anchor, as a fraction of the image
_ROUNDS = 4  # of the suppression among tokens


class LearnedQueries(nn.Module):
    """Learned queries: boxes and contents are learned, the same for all images (Deformable DETR, arXiv 2010.04159).

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
        content = self.contents(memory.features).expand(images, -1, -1)  # (B, Q, E)
        box_logits = to_float32(self.anchors.weight).expand(images, -1, -1)  # (B, Q, 4)
        logits = content.new_zeros(0, images, self.num_queries, self.num_classes)
        return Queries(content, box_logits), LayerOutputs(logits, box_logits.new_zeros(0, *box_logits.shape))

    def contents(self, features: Tensor) -> Tensor:
        """(Q, E), in any case; `features` (B, S, E) are those of the memory."""
        return self.content.weight


class LearnedAnchors(LearnedQueries):
    """Static queries: boxes are learned, contents are zero vectors (DETR; DAB-DETR, arXiv 2201.12329).

    The paper's section 3.4 starts from these. Arguments are those of `LearnedQueries`.
    """

    def __init__(self, *, num_queries: int, num_classes: int, embed_dim: int = 256):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim)
        del self.content  # nothing would train it

    def contents(self, features: Tensor) -> Tensor:
        """Zeros (Q, E)."""
        return features.new_zeros(self.num_queries, features.shape[-1])


class LearnedSizeSelection(QuerySelection):
    """Query selection with a learned width and height of the anchors (`two_stage_learn_wh` of the official program).

    Both are those of the finest level, the same for all images, and double with every level. The box losses of the
    proposals train them. Arguments are those of `QuerySelection`; `anchor_size` is where both start.
    """

    def __init__(self, *, num_queries: int, num_classes: int, embed_dim: int = 256, anchor_size: float = 0.05):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim, anchor_size=anchor_size)
        self.size = nn.Embedding(1, 2)  # before the sigmoid
        nn.init.constant_(self.size.weight, math.log(anchor_size / (1 - anchor_size)))

    def sides(self, like: Tensor, level: int) -> Tensor:
        """(2,) width and height of the anchors of a level."""
        # Anchors beyond 0.99 are unusable. At 1 the logarithm would give them a gradient that is no number.
        return (to_float32(self.size.weight[0]).sigmoid() * 2.0**level).clamp(max=_LARGEST_SIDE).to(like)


class AllTokenSelection(QuerySelection):
    """Query selection whose proposals are those of all tokens (two-stage Deformable DETR, arXiv 2010.04159).

    Queries are those of `QuerySelection`. Tokens without a usable anchor have the box (1, 1, 1, 1), and losses too.
    There are more proposals than queries: use `SeparateCriterion`. The authors of DINO found no clear gain, for more
    time and memory. Arguments are those of `QuerySelection`.
    """

    def choose(self, memory: Tokens, project: nn.Module) -> tuple[Queries, LayerOutputs]:
        """See `QuerySelection.choose`; there are as many proposals as tokens."""
        anchors, usable = self.anchors(memory)
        features = project(memory.features.masked_fill(~usable[..., None], 0))  # (B, S, E)
        box_logits = anchors + to_float32(self.box_head(features))  # (B, S, 4)
        proposals = LayerOutputs(self.class_head(features)[None], box_logits.sigmoid()[None])
        with torch.no_grad():
            best = self.best_tokens(features, anchors, usable, memory.padding_mask)[..., None]  # (B, Q, 1)
        contents = self.contents(features.gather(1, best.expand(-1, -1, features.shape[-1])))
        return Queries(contents, box_logits.detach().gather(1, best.expand(-1, -1, 4))), proposals


class DistinctSelection(QuerySelection):
    """Query selection that prefers distinct boxes (the distinct queries of DDQ, arXiv 2303.12776).

    Neighbouring tokens see the same object. Of the best tokens, those whose box overlaps that of a better kept one come
    after all others. So the decoder has fewer duplicates to reject, and no object is lost: a token that comes last is
    still a query where Q is not filled otherwise. Detections are not filtered.

    Args:
        max_iou: overlap above which a token comes last, whatever its class; 0.8 in DDQ.
        pool: tokens that are compared, as a multiple of `num_queries`.
        arguments: of `QuerySelection`.
    """

    def __init__(self, *, max_iou: float = 0.7, pool: int = 4, **arguments: Any):
        super().__init__(**arguments)
        self.max_iou = max_iou
        self.pool = pool

    @torch.no_grad()
    def best_tokens(self, features: Tensor, anchors: Tensor, usable: Tensor, padding_mask: Tensor | None) -> Tensor:
        """See `QuerySelection.best_tokens`."""
        scores = self.scores(self.class_head(features), usable, padding_mask)  # (B, S)
        pool = scores.topk(at_most(self.pool * self.num_queries, scores.shape[1]), dim=1).indices  # (B, R)
        boxes = cxcywh_to_xyxy(self.box_logits(features, anchors, pool).sigmoid())  # (B, R, 4)
        dropped = ~_keep_distinct(boxes, self.max_iou)  # (B, R)
        # Plus a number, not the pool's size: ONNX can't multiply by a size that is open.
        place = torch.arange(pool.shape[1], device=pool.device) + self.pool * self.num_queries * dropped
        first = place.topk(at_most(self.num_queries, pool.shape[1]), dim=1, largest=False).indices  # (B, Q)
        return pool.gather(1, first)


def _keep_distinct(boxes: Tensor, max_iou: float) -> Tensor:
    """Mark boxes that overlap no better kept one by more than `max_iou`.

    Boxes are compared all at once, so that graphs of any kind can hold it: a box is dropped if a box kept in the round
    before overlaps it. The result is that of non-maximum suppression, but where chains of boxes, each of which would
    drop the next one, are longer than the rounds.

    Args:
        boxes: (B, R, 4) xyxy, best first.

    Returns:
        (B, R) bool.
    """
    overlaps = (box_iou(boxes[:, :, None], boxes[:, None]) > max_iou).triu(1)  # (B, R, R), row: the better box
    keep = torch.ones_like(overlaps[:, 0])
    for _ in range(_ROUNDS):
        keep = ~(overlaps & keep[..., None]).any(1)
    return keep


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
