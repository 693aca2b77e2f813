"""A whole network from one function call, for programs without Detectron2's configuration system."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dino.layers.denoising import ContrastiveDenoising
from dino.layers.position_encoding import SinePositionEncoding

from .dino import DINO
from .neck import ChannelMapper
from .transformer import HIDDEN_DIM, Decoder, Encoder, QuerySelection


def build_dino(
    *,
    backbone: nn.Module,
    num_classes: int,
    in_features: Sequence[str] = ("res3", "res4", "res5"),
    num_levels: int = 4,
    num_queries: int = 900,
    num_denoising: int = 100,
    embed_dim: int = 256,
    num_heads: int = 8,
    num_points: int = 4,
    hidden_dim: int = HIDDEN_DIM,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    query_selection: nn.Module | None = None,
) -> DINO:
    """A DINO around `backbone`; the defaults make a 4-scale model.

    Args:
        backbone, in_features: as of `ChannelMapper`.
        num_classes: C, number of classes.
        num_levels: L, levels of the pyramid.
        num_queries: Q, candidates of an image.
        num_denoising: budget of denoising queries, see `ContrastiveDenoising`.
        embed_dim: E, channels of the pyramid, width of encoder and decoder.
        num_heads: M, heads of attention.
        num_points: P, sampling points of each head, in each level.
        hidden_dim: width of the feed-forward networks.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        query_selection: in place of `QuerySelection`, for the same queries, classes and width.
    """
    attention = {"num_heads": num_heads, "num_levels": num_levels, "num_points": num_points, "hidden_dim": hidden_dim}
    if query_selection is None:
        query_selection = QuerySelection(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim)
    return DINO(
        neck=ChannelMapper(backbone=backbone, in_features=in_features, out_channels=embed_dim, num_levels=num_levels),
        position_encoding=SinePositionEncoding(embed_dim),
        encoder=Encoder(num_layers=encoder_layers, embed_dim=embed_dim, **attention),
        query_selection=query_selection,
        denoising=ContrastiveDenoising(num_classes=num_classes, embed_dim=embed_dim, num_denoising=num_denoising),
        decoder=Decoder(num_classes=num_classes, num_layers=decoder_layers, embed_dim=embed_dim, **attention),
    )
