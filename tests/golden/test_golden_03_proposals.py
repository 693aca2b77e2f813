"""Anchors, valid ratios and encoder reference points against the official program.

The file's `*_learnedwh` arrays belong to an option of the official program that is not part of DINO.
"""

import pytest
import torch

from dino.layers import Tokens
from dino.modeling import Encoder, QuerySelection
from dino.modeling.dino import _valid_size

from .golden import GoldenFile

golden = GoldenFile("03")


@pytest.fixture
def tokens():
    shapes = [tuple(row) for row in golden["spatial_shapes"].tolist()]
    padding, memory = golden["padding_mask"], golden["memory"]
    levels = padding.split([h * w for h, w in shapes], 1)
    return Tokens(
        features=memory,
        position=torch.zeros_like(memory),
        padding_mask=padding,
        shapes=shapes,
        valid_sizes=torch.stack([_valid_size(p.unflatten(1, s)) for p, s in zip(levels, shapes, strict=True)], 1),
    )


def test_anchors(tokens):
    selection = QuerySelection(num_queries=1, num_classes=1, embed_dim=tokens.features.shape[-1])
    anchors, usable = selection.anchors(tokens)
    golden.check("output_proposals", anchors)
    golden.check("output_memory", tokens.features.masked_fill(~usable[..., None], 0))


def test_valid_ratios(tokens):
    golden.check("valid_ratios", tokens.valid_ratios)


def test_encoder_reference_points(tokens):
    """Read off what the encoder hands to its first layer."""
    width, levels = tokens.features.shape[-1], len(tokens.shapes)
    encoder = Encoder(num_layers=1, embed_dim=width, num_heads=1, num_levels=levels, num_points=1, hidden_dim=1)
    seen = []
    encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    encoder(tokens)
    golden.check("encoder_reference_points", seen[0])
