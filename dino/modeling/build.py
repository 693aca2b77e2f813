"""The whole assembly as one expression, for programs that do without Detectron2's configuration system."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dino.layers.denoising import ContrastiveDenoising
from dino.layers.position_encoding import SinePositionEncoding

from .neck import ChannelMapper
from .network import DINO
from .transformer import Decoder, Encoder, QuerySelection


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
    hidden_dim: int = 2048,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
) -> DINO:
    """A DINO around `backbone`; the defaults make a 4-scale model. Arguments as in the parts of the same name."""
    attention = {"num_heads": num_heads, "num_levels": num_levels, "num_points": num_points, "hidden_dim": hidden_dim}
    return DINO(
        neck=ChannelMapper(backbone=backbone, in_features=in_features, out_channels=embed_dim, num_levels=num_levels),
        position_encoding=SinePositionEncoding(embed_dim),
        encoder=Encoder(num_layers=encoder_layers, embed_dim=embed_dim, **attention),
        query_selection=QuerySelection(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim),
        denoising=ContrastiveDenoising(num_classes=num_classes, embed_dim=embed_dim, num_denoising=num_denoising),
        decoder=Decoder(num_classes=num_classes, num_layers=decoder_layers, embed_dim=embed_dim, **attention),
    )
