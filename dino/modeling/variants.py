"""What the paper and its readers compare DINO with: each class takes the place of the part whose signature it has.

In a recipe, `model.network.decoder._target_ = LookForwardOnce` is enough; projects/dino/configs/ablation has them all.
Two variants need no class: `num_denoising=0` switches denoising off, and `num_classes=1` makes `QuerySelection` ask
whether a token holds any object at all (with `ObjectnessCriterion`, which charges for that).
"""

from __future__ import annotations

import re

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

AUXILIARY = re.compile(r"loss_[a-z]+(_dn)?_\d+")  # names of the losses of all decoder layers but the last


# Where queries come from: in place of `QuerySelection`


class LearnedQueries(nn.Module):
    """Static queries: boxes and contents are learned, the same for all images (DAB-DETR, arXiv 2201.12329).

    The encoder proposes nothing, so there are no `_interm` losses. Anchors start as DAB-DETR's do, from a normal
    distribution in logit space: large boxes around the middle. Unlike selected boxes, they get a gradient.

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
        """Memory -> Q queries, whatever it holds, and predictions of no layer (N = 0)."""
        images = memory.features.shape[0]
        content = self.content.weight.expand(images, -1, -1)  # (B, Q, E)
        box_logits = to_float32(self.anchors.weight).expand(images, -1, -1)  # (B, Q, 4)
        logits = content.new_zeros(0, images, self.num_queries, self.num_classes)
        return Queries(content, box_logits), LayerOutputs(logits, box_logits.new_zeros(0, *box_logits.shape))


class PureSelection(QuerySelection):
    """Boxes and contents come from the best tokens (the paper's figure 5 b; two-stage Deformable DETR selects so, too).

    Contents are the tokens' features without gradient, as in the official program with `embed_init_tgt=False`.
    (Deformable DETR makes them from the code of the box.) Arguments are those of `QuerySelection`.
    """

    def __init__(self, *, num_queries: int, num_classes: int, embed_dim: int = 256, anchor_size: float = 0.05):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim, anchor_size=anchor_size)
        del self.content  # nothing would train it

    def contents(self, features: Tensor) -> Tensor:
        """The features (B, Q, E) themselves."""
        return features.detach()


class PatternSelection(PureSelection):
    """From each selected box start several queries, told apart by learned patterns (Anchor DETR, arXiv 2109.07107).

    All boxes carry the same patterns, which are all that is learned of the contents. There are more queries than
    proposals, which wants a `SeparateCriterion`.

    Args:
        num_queries: boxes that are selected; the decoder gets `num_patterns` queries for each.
        num_classes, embed_dim, anchor_size: as of `QuerySelection`.
        num_patterns: contents of a box.
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


# What is noised: in place of `ContrastiveDenoising`


class PositiveDenoising(ContrastiveDenoising):
    """Denoising without negatives (DN-DETR, arXiv 2203.01305): a group holds one positive for each object.

    Groups, mask, budget and noise are those of `ContrastiveDenoising`, so that the two differ in the negatives alone.
    (DN-DETR itself has 5 groups, and shifts and scales boxes instead of moving their corners.)
    """

    KINDS = 1


class ShiftDenoising(ContrastiveDenoising):
    """Contrastive denoising whose negatives are boxes of the object's own size, moved aside.

    The centre (cx, cy) moves to (cx + sx (1 + ux) box_noise w/2, cy + sy (1 + uy) box_noise h/2), with signs sx, sy
    and ux, uy uniform in [0, 1): along each axis by one to two half sides, at a `box_noise` of 1. So at most a quarter
    of the object stays covered, an IoU of 1/7 at most, and no side is ever inverted. Corners are then clamped to the
    image, which cuts boxes off at its border. Positives are those of `ContrastiveDenoising`.
    """

    def steps(self, noise: Noise) -> Tensor:
        """(R, K, 4): by how many half sides each number of (x0, y0, x1, y1) moves; two corners of a negative alike."""
        steps = super().steps(noise)
        steps[1::2, :, 2:] = steps[1::2, :, :2]
        return steps


# How boxes are refined, and how tokens know their place: in place of `Decoder`, `Encoder`, `SinePositionEncoding`


class LookForwardOnce(Decoder):
    """Boxes of layer i are a step from the boxes that the layer read, without their gradient (Deformable DETR).

    The loss of layer i then trains the box head of layer i alone. `use_detached_boxes_dec_out=True` of the official
    program. Arguments are those of `Decoder`.
    """

    def look_forward(self, boxes: Tensor) -> Tensor:
        """The boxes without gradient."""
        return boxes.detach()


class PlacedEncoder(Encoder):
    """Adds the tokens' positions to their features, in front of its layers.

    For an encoder of no layers, where nothing else would read the codes of place and level. Arguments are those of
    `Encoder`.
    """

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens -> the same with new features."""
        return super().forward(tokens.with_features(tokens.features + tokens.position))


class LearnedPositionEncoding(nn.Module):
    """Learned absolute codes of rows and columns in place of sines (DETR's appendix, arXiv 2005.12872).

    A cell's place is taken relative to the unpadded part of its image, as by `SinePositionEncoding`, and read off
    between the two nearest of `num_codes` learned codes. (DETR numbers the cells and fails beyond 50.)

    Args:
        embed_dim: number of channels; the first half encodes y, the second half x.
        num_codes: along each axis.
    """

    def __init__(self, embed_dim: int, *, num_codes: int = 50):
        super().__init__()
        self.rows = nn.Embedding(num_codes, embed_dim // 2)
        self.columns = nn.Embedding(num_codes, embed_dim // 2)
        for codes in (self.rows, self.columns):
            nn.init.uniform_(codes.weight)

    def forward(self, padding: Tensor) -> Tensor:
        """(B, H, W) bool, True on padding -> (B, E, H, W) float32."""
        valid = ~padding
        codes = []
        for table, axis in ((self.rows, 1), (self.columns, 2)):
            count = valid.cumsum(axis, dtype=torch.float32)  # (B, H, W)
            place = (count - 0.5) / count.amax(axis, keepdim=True).clamp(min=1)
            codes.append(between(table.weight, place.clamp(min=0)))
        return torch.cat(codes, -1).permute(0, 3, 1, 2)


def between(codes: Tensor, place: Tensor) -> Tensor:
    """codes (K, D), places (...) in [0, 1], of which 0 is the first code and 1 the last -> (..., D) in float32."""
    codes = to_float32(codes)
    scaled = place * (len(codes) - 1)
    low = scaled.floor().clamp(max=len(codes) - 2).long()
    part = (scaled - low)[..., None]
    return codes[low] * (1 - part) + codes[low + 1] * part


# What is charged: in place of `SetCriterion`


class FinalCriterion(SetCriterion):
    """Without auxiliary losses: all decoder layers but the last are free of charge; the proposals are not.

    The free losses are named as ever and 0, and so are the gradients of the heads that nothing else trains: with all
    parameters in the graph, distributed training goes on. Arguments are those of `SetCriterion`.
    """

    def forward(self, outputs: Outputs, targets: list[Target]) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars."""
        losses = super().forward(outputs, targets)
        return {name: 0 * loss if AUXILIARY.fullmatch(name) else loss for name, loss in losses.items()}


class SeparateCriterion(SetCriterion):
    """Charges the encoder's proposals by themselves: they may differ from the decoder's predictions in number.

    Names, weights and numbers are those of `SetCriterion`, as are the arguments.
    """

    def forward(self, outputs: Outputs, targets: list[Target]) -> dict[str, Tensor]:
        """Outputs and B targets -> named scalars."""
        losses = super().forward(outputs._replace(proposals=no_layers(outputs.decoder)), targets)
        proposed = Outputs(outputs.proposals, no_layers(outputs.proposals))
        targets = [self.proposal_target(target) for target in targets]
        return losses | {f"{name}_interm": loss for name, loss in super().forward(proposed, targets).items()}

    def proposal_target(self, target: Target) -> Target:
        """What the proposals of an image shall find."""
        return target


class ObjectnessCriterion(SeparateCriterion):
    """For a `QuerySelection` with `num_classes=1`: proposals shall find objects of whatever class.

    Two-stage Deformable DETR (arXiv 2010.04159) selects so: five numbers for each token, an objectness and a box. (Its
    losses are for all tokens, these for the selected ones, as DINO's.)
    """

    def proposal_target(self, target: Target) -> Target:
        """The same objects, all of class 0."""
        return target._replace(labels=torch.zeros_like(target.labels))


def no_layers(predictions: LayerOutputs) -> LayerOutputs:
    """Outputs of the same sizes, but N = 0."""
    return LayerOutputs(*(x[:0] for x in predictions))
