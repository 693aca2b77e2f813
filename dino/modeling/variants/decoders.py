"""Variants of `Decoder`."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from dino.layers.relation import PositionRelation

from ..transformer import MLP, Attend, Decoder, full_attention


class LookForwardOnce(Decoder):
    """Look forward once: layer i refines the boxes that it read, without their gradient (Deformable DETR).

    The loss of layer i then trains the box head of layer i alone, as with `use_detached_boxes_dec_out=True` of the
    official program. Arguments are those of `Decoder`.
    """

    def look_forward(self, boxes: Tensor) -> Tensor:
        """The boxes without gradient."""
        return boxes.detach()


class RelationDecoder(Decoder):
    """Self-attention with a bias from the positions of both boxes, from the second layer on (arXiv 2407.11699).

    The bias of layer i relates the boxes of layer i-2 (rows) and of layer i-1 (columns); layer 1 has the initial boxes
    for the former. Denoising queries have it too, within their mask. Contents scale the position codes, also from the
    second layer on. Both do nothing at the start: with the weights of a `Decoder` it predicts what that predicts. With
    `full_attention` as interaction, a branch goes without the bias.

    Args:
        num_layers, embed_dim, num_heads: as of `Decoder`; at least two layers.
        options: the other arguments of `Decoder`.

    Raises:
        ValueError: there are fewer layers.
    """

    def __init__(self, *, num_layers: int = 6, embed_dim: int = 256, num_heads: int = 8, **options: int):
        if num_layers < 2:
            raise ValueError(f"a relation needs at least two decoder layers, not {num_layers}")
        super().__init__(num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, **options)
        self.relation = PositionRelation(num_heads)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim)
        nn.init.zeros_(self.query_scale[-1].weight)
        nn.init.ones_(self.query_scale[-1].bias)

    def interaction(self, mask: Tensor | None, boxes: list[Tensor]) -> Attend:
        """Full attention in the first layer, then with the relation between the last two sets of boxes."""
        if len(boxes) == 1:
            return full_attention(mask, boxes)
        return partial(self.relation, mask=mask, source=boxes[-2], target=boxes[-1])

    def scale_position(self, position: Tensor, x: Tensor, layer: int) -> Tensor:
        """Times a number for each channel, which an MLP computes from the contents x (B, Q, E)."""
        return position * self.query_scale(x) if layer else position
