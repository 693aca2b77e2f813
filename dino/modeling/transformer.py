"""Encoder, mixed query selection and decoder of DINO (paper sections 3.1, 3.4 and 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.layers.boxes import refine, to_float32
from dino.layers.deform_attn import MultiScaleDeformableAttention
from dino.layers.feed_forward import FeedForward
from dino.layers.position_encoding import encode_boxes
from dino.structures import LayerOutputs, Queries, Tokens, at_most

HIDDEN_DIM = 2048  # width of the feed-forward networks, as published

# How queries read each other: queries, keys and values (B, M, Q, D) each -> (B, M, Q, D).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Chooses it for the next layer. Additive mask (Q, Q) or None, and the boxes (B, Q, 4) so far: the initial ones, then
# the predictions of each layer -> None where queries do not read each other.
Interaction = Callable[[Tensor | None, list[Tensor]], Attend | None]

_FOCAL_PRIOR = -math.log((1 - 0.01) / 0.01)  # bias of class heads: every class starts at a probability of 1 %


class MLP(nn.Sequential):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, *dims: int):
        layers: list[nn.Module] = []
        for i, o in pairwise(dims):
            layers += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*layers[:-1])


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """(..., E) -> (..., C) logits, biased to a score of 0.01."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, _FOCAL_PRIOR)
    return head


def box_head(embed_dim: int) -> MLP:
    """(..., E) -> (..., 4) steps in logit space, all zero at the start."""
    head = MLP(embed_dim, embed_dim, embed_dim, 4)
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


def _xavier(module: nn.Module) -> None:
    """Initialise the weights of all linear layers in `module`; biases keep torch's default."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)


class _EncoderLayer(nn.Module):
    """Deformable self-attention over the pyramid, then a feed-forward network."""

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int, hidden_dim: int):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim)

    def forward(self, x: Tensor, tokens: Tokens, reference: Tensor) -> Tensor:
        """x (B, S, E), reference (B, S, L, 2) -> (B, S, E)."""
        read = self.attention(x + tokens.position, reference, x, tokens.padding_mask, tokens.shapes)
        return self.feed_forward(self.norm(x + read))


def _token_centers(tokens: Tokens) -> Tensor:
    """(B, S, 2): the centre of every cell as (x, y), as a fraction of the unpadded image."""
    centers = []
    for level, (height, width) in enumerate(tokens.shapes):
        y = torch.arange(height, device=tokens.valid_sizes.device, dtype=torch.float32) + 0.5
        x = torch.arange(width, device=tokens.valid_sizes.device, dtype=torch.float32) + 0.5
        grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)  # (H*W, 2)
        centers.append(grid / tokens.valid_sizes[:, None, level])
    return torch.cat(centers, 1)


class Encoder(nn.Module):
    """Exchanges information between the tokens of all levels, by deformable self-attention.

    Args:
        num_layers: N, number of layers.
        embed_dim: E, width of the tokens.
        num_heads, num_points: M heads of attention; P sampling points of each head, in each level.
        num_levels: L, levels of the pyramid.
        hidden_dim: width of the feed-forward networks.
    """

    def __init__(
        self,
        *,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        hidden_dim: int = HIDDEN_DIM,
    ):
        super().__init__()
        args = (embed_dim, num_heads, num_levels, num_points, hidden_dim)
        self.layers = nn.ModuleList(_EncoderLayer(*args) for _ in range(num_layers))

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens -> the same with new features, the "memory"."""
        reference = _token_centers(tokens)[:, :, None] * tokens.valid_ratios[:, None]  # (B, S, L, 2)
        x = tokens.features
        memory = self.fuse(None, x, 0)
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, tokens, reference)
            memory = self.fuse(memory, x, i)
        return tokens.with_features(memory)

    def fuse(self, memory: Tensor | None, x: Tensor, layer: int) -> Tensor:
        """What the states up to x (B, S, E) give, from what those before gave; state 0 is the input of layer 1."""
        return x


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, ·), index (B, Q) -> (B, Q, ·). (`take_along_dim` would fix B in an exported graph.)"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class QuerySelection(nn.Module):
    """Mixed query selection (paper section 3.4): boxes come from the best tokens, contents are learned.

    Args:
        num_queries: Q, queries of an image. Images with fewer tokens get as many queries as tokens.
        num_classes, embed_dim: C; E, width of the tokens.
        anchor_size: side of the anchors of the finest level as a fraction of the image; it doubles with every level.
    """

    def __init__(self, *, num_queries: int, num_classes: int, embed_dim: int = 256, anchor_size: float = 0.05):
        super().__init__()
        self.num_queries = num_queries
        self.anchor_size = anchor_size
        self.project = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.LayerNorm(embed_dim))
        self.class_head = class_head(embed_dim, num_classes)
        self.box_head = box_head(embed_dim)
        self.content = nn.Embedding(num_queries, embed_dim)
        _xavier(self.project)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Tokens) -> tuple[Queries, LayerOutputs]:
        """Memory -> Q queries, and the encoder's own predictions for the selected tokens (N = 1)."""
        return self.choose(memory, self.project)

    def choose(self, memory: Tokens, project: nn.Module) -> tuple[Queries, LayerOutputs]:
        """As `forward`, with the features (..., E) -> (..., E) of tokens that `project` makes."""
        anchors, usable = self.anchors(memory)
        tokens = memory.features.masked_fill(~usable[..., None], 0)  # (B, S, E)
        best = self.best_tokens(project(tokens), anchors, usable, memory.padding_mask)  # (B, Q)
        features = project(_gather_tokens(tokens, best))  # (B, Q, E); again: other tokens keep no activations
        logits = self.class_head(features)  # (B, Q, C)
        box_logits = _gather_tokens(anchors, best) + to_float32(self.box_head(features))  # (B, Q, 4)
        proposals = LayerOutputs(logits[None], box_logits.sigmoid()[None])
        return Queries(self.contents(features), box_logits.detach()), proposals

    @torch.no_grad()
    def next_boxes(self, memory: Tokens, count: int) -> Tensor:
        """Box logits (B, Q, 4) of the `count` best tokens after those that `select` chooses, as far as there are."""
        anchors, usable = self.anchors(memory)
        features = self.project(memory.features.masked_fill(~usable[..., None], 0))  # (B, S, E)
        logits = self.class_head(features)
        order = self.scores(logits, usable, memory.padding_mask).argsort(dim=1, descending=True, stable=True)  # (B, S)
        # Many tokens share the lowest score. Skipping the chosen ones by number takes no token twice.
        chosen = self.best_tokens(features, anchors, usable, memory.padding_mask)
        is_chosen = torch.zeros_like(usable).scatter_(1, chosen, True).gather(1, order)
        last = is_chosen.to(torch.uint8).argsort(dim=1, stable=True)[:, : order.shape[1] - chosen.shape[1]]
        best = order.gather(1, last)[:, :count]
        return self.box_logits(features, anchors, best)

    def box_logits(self, features: Tensor, anchors: Tensor, tokens: Tensor) -> Tensor:
        """Predict the boxes (B, R, 4) of tokens (B, R), given all features (B, S, E) and anchors (B, S, 4)."""
        return _gather_tokens(anchors, tokens) + to_float32(self.box_head(_gather_tokens(features, tokens)))

    def contents(self, features: Tensor) -> Tensor:
        """Contents of the queries, given the features (B, Q, E) of their tokens -> (B, Q, E)."""
        return self.content.weight[: features.shape[1]].repeat(features.shape[0], 1, 1)

    def best_tokens(self, features: Tensor, anchors: Tensor, usable: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, Q) indices of the chosen tokens, best first, given their features (B, S, E) and anchors (B, S, 4)."""
        return self.select(self.class_head(features), usable, padding_mask)

    def select(self, logits: Tensor, usable: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, Q) indices of the tokens of highest score over all classes, best first.

        Tokens without a usable anchor come after all others, and padded tokens last. (In the official program both
        compete with the logits of a zero vector, and can win.)
        """
        scores = self.scores(logits, usable, padding_mask)
        return scores.topk(at_most(self.num_queries, scores.shape[1]), dim=1).indices

    def scores(self, logits: Tensor, usable: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The score (B, S) of each token, by which `select` ranks."""
        scores = to_float32(logits.detach()).amax(-1)  # (B, S)
        scores = scores.masked_fill(~usable, torch.finfo(scores.dtype).min)
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask, -math.inf)
        return scores

    def anchors(self, memory: Tokens) -> tuple[Tensor, Tensor]:
        """One box per token in logit space (B, S, 4), +inf where unusable; whether it is usable (B, S) bool.

        An anchor is usable if all its numbers lie within (0.01, 0.99) and its token is not padding.
        """
        centers = _token_centers(memory)  # (B, S, 2)
        sizes = [self.sides(centers, level).expand(h * w, 2) for level, (h, w) in enumerate(memory.shapes)]
        boxes = torch.cat([centers, torch.cat(sizes).expand(centers.shape[0], -1, -1)], -1)  # (B, S, 4)
        usable = ((boxes > 0.010001) & (boxes < 0.989999)).all(-1)  # OpenVINO's 0.5 / 50 exceeds 0.01
        if memory.padding_mask is not None:
            usable = usable & ~memory.padding_mask
        return torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], math.inf), usable

    def sides(self, like: Tensor, level: int) -> Tensor:
        """(2,) width and height of the anchors of a level."""
        return like.new_full((2,), self.anchor_size * 2.0**level)


class SelfAttention(nn.MultiheadAttention):
    """Self-attention among queries, with the parameters of PyTorch's module but fewer operations.

    One matrix product computes queries and keys, and no tensor is copied to have the dimension of queries in front.

    Args:
        embed_dim, num_heads: E, M.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__(embed_dim, num_heads, batch_first=True)

    def forward(self, x: Tensor, position: Tensor, attend: Attend) -> Tensor:
        """x and position (B, Q, E) -> (B, Q, E)."""
        sizes = (2 * self.embed_dim, self.embed_dim)
        (weight_qk, weight_v), (bias_qk, bias_v) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
        qk = F.linear(x + position, weight_qk, bias_qk).unflatten(-1, (2, self.num_heads, -1))  # (B, Q, 2, M, D)
        v = F.linear(x, weight_v, bias_v).unflatten(-1, (self.num_heads, -1))  # (B, Q, M, D)
        q, k, v = (part.transpose(1, 2) for part in (*qk.unbind(2), v))  # (B, M, Q, D)
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward network; a norm after each."""

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int, hidden_dim: int):
        super().__init__()
        self.self_attention = SelfAttention(embed_dim, num_heads)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim)
        _xavier(self.self_attention)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Tokens, attend: Attend | None) -> Tensor:
        """x and position (B, Q, E), reference (B, Q, L, 4) -> (B, Q, E); without `attend` no self-attention."""
        if attend:
            x = self.self_norm(x + self.self_attention(x, position, attend))
        read = self.cross_attention(x + position, reference, memory.features, memory.padding_mask, memory.shapes)
        return self.feed_forward(self.cross_norm(x + read))


def _additive_mask(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool -> minus infinity where True, 0 elsewhere; once for all layers instead of once in each."""
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(attn_mask, -math.inf)


def full_attention(mask: Tensor | None, boxes: list[Tensor]) -> Attend:
    """Every query reads all that the mask leaves: the `Interaction` of DINO."""
    return partial(F.scaled_dot_product_attention, attn_mask=mask)


class Decoder(nn.Module):
    """Refines the boxes of the queries layer by layer and predicts after each (paper section 3.5).

    Each layer has its own pair of heads, as in detrex; those of `SharedHeadsDecoder` use one pair.

    Args:
        num_classes: C, number of classes.
        num_layers: N, number of layers.
        embed_dim: E, width of the queries.
        num_heads, num_points: M heads of attention; P sampling points of each head, in each level.
        num_levels: L, levels of the pyramid.
        hidden_dim: width of the feed-forward networks.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        hidden_dim: int = HIDDEN_DIM,
    ):
        super().__init__()
        args = (embed_dim, num_heads, num_levels, num_points, hidden_dim)
        self.layers = nn.ModuleList(DecoderLayer(*args) for _ in range(num_layers))
        self.class_heads = nn.ModuleList(class_head(embed_dim, num_classes) for _ in range(num_layers))
        self.box_heads = nn.ModuleList(box_head(embed_dim) for _ in range(num_layers))
        self.position = MLP(2 * embed_dim, embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.embed_dim = embed_dim
        _xavier(self.position)

    def forward(self, queries: Queries, memory: Tokens, interaction: Interaction | None = None) -> LayerOutputs:
        """Queries and memory -> predictions of N layers; another `interaction` than the decoder's own for a branch.

        Look forward twice: layer i refines `previous`, the boxes of layer i-1 with their gradient, so that the loss of
        layer i also trains the step of layer i-1. The attention of layer i reads the same boxes without gradient. The
        predicted boxes come from the state after the norm, the boxes for the next layer from the state before it.
        """
        interaction = interaction or self.interaction
        x, boxes = queries.content, queries.box_logits.sigmoid()
        previous = boxes
        ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        mask = None if queries.attn_mask is None else _additive_mask(queries.attn_mask, x.dtype)
        logits, refined = [], [boxes]
        for layer, to_class, to_delta in zip(self.layers, self.class_heads, self.box_heads, strict=True):
            reference = boxes[:, :, None] * ratios  # (B, Q, L, 4)
            position = self.position(encode_boxes(reference[:, :, 0], self.embed_dim // 2).to(x.dtype))
            position = self.scale_position(position, x, len(logits))
            x = layer(x, position, reference, memory, interaction(mask, refined))
            normed = self.norm(x)
            logits.append(to_class(normed))
            refined.append(refine(previous, to_delta(normed)))
            previous = self.look_forward(refine(boxes, to_delta(x)))
            boxes = previous.detach()
        return LayerOutputs(torch.stack(logits), torch.stack(refined[1:]))

    interaction = staticmethod(full_attention)  # how queries read each other, see `Interaction`

    def scale_position(self, position: Tensor, x: Tensor, layer: int) -> Tensor:
        """The position codes (B, Q, E) of the queries x (B, Q, E), as layer number `layer` reads them."""
        return position

    def look_forward(self, boxes: Tensor) -> Tensor:
        """The boxes (B, Q, 4) of this layer, as the next layer refines them."""
        return boxes


def share_heads(decoder: Decoder) -> Decoder:
    """Use the first layer's heads in all layers of `decoder`, in place, as in the official program."""
    for heads in (decoder.class_heads, decoder.box_heads):
        for i in range(len(heads)):
            heads[i] = heads[0]
    return decoder


class SharedHeadsDecoder(Decoder):
    """A `Decoder` whose layers all use one pair of heads, as in the paper (appendix D.3) and the official program.

    The heads of the encoder's proposals stay their own. Arguments are those of `Decoder`.
    """

    def __init__(self, **options: int):
        super().__init__(**options)
        share_heads(self)
