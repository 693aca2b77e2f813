"""A network that trains a step in a few hundredths of a second, and batches for it."""

import torch
from torch import nn

from dino.layers import ContrastiveDenoising, HungarianMatcher, SetCriterion, SinePositionEncoding, Target
from dino.modeling import DINO, ChannelMapper, Decoder, Encoder, QuerySelection
from dino.modeling.backbones import FeatureShape


class TinyBackbone(nn.Module):
    """Three convolutions with the strides, and the odd sizes, of a ResNet's last stages."""

    def __init__(self):
        super().__init__()
        self.res3 = nn.Conv2d(3, 4, 9, stride=8, padding=4)
        self.res4 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.res5 = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def output_shape(self):
        return {"res3": FeatureShape(4, 8), "res4": FeatureShape(6, 16), "res5": FeatureShape(8, 32)}

    def forward(self, images):
        maps = {}
        for name, convolution in self.named_children():
            images = maps[name] = convolution(images).tanh()
        return maps


def tiny_network(
    *, num_classes=3, num_queries=12, num_denoising=6, num_layers=2, embed_dim=32, num_levels=4, branches=None
):
    """The last level is made by the neck, those before it are the backbone's last ones."""
    sizes = {"embed_dim": embed_dim, "num_heads": 4, "num_levels": num_levels, "num_points": 2, "hidden_dim": 16}
    return DINO(
        neck=ChannelMapper(
            backbone=TinyBackbone(),
            in_features=["res3", "res4", "res5"][4 - num_levels :],
            out_channels=embed_dim,
            num_levels=num_levels,
            norm_groups=8,
        ),
        position_encoding=SinePositionEncoding(embed_dim),
        encoder=Encoder(num_layers=1, **sizes),
        query_selection=QuerySelection(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim),
        denoising=ContrastiveDenoising(num_classes=num_classes, embed_dim=embed_dim, num_denoising=num_denoising),
        decoder=Decoder(num_classes=num_classes, num_layers=num_layers, **sizes),
        branches=branches,
    )


def default_criterion():
    return SetCriterion(matcher=HungarianMatcher())


def random_boxes(*shape):
    """Boxes of moderate size inside the image, (*shape, 4) as (cx, cy, w, h)."""
    size = 0.1 + 0.3 * torch.rand(*shape, 2)
    center = size / 2 + (1 - size) * torch.rand(*shape, 2)
    return torch.cat([center, size], -1)


def random_targets(*counts, num_classes=3):
    return [Target(torch.randint(num_classes, (n,)), random_boxes(n)) for n in counts]


def random_batch(images, height=64, width=64):
    """Images (B, 3, H, W) and their padding; all but the first are padded by a quarter at the right and the bottom."""
    padding = torch.zeros(images, height, width, dtype=torch.bool)
    padding[1:, height * 3 // 4 :] = True
    padding[1:, :, width * 3 // 4 :] = True
    return torch.randn(images, 3, height, width).masked_fill(padding[:, None], 0), padding


@torch.no_grad()
def stirred(model):
    """Moves every trainable parameter a little: heads that begin at zero would hide what lies before them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
