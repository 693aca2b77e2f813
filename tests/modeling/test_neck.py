import pytest
import torch
from torch.nn import functional as F

from dino.modeling import ChannelMapper
from dino.modeling.backbones import FeatureShape

from ..tiny import TinyBackbone

FEATURES = ["res3", "res4", "res5"]


def make(**changes):
    arguments = {"backbone": TinyBackbone(), "in_features": FEATURES, "out_channels": 16, "norm_groups": 4}
    return ChannelMapper(**arguments | changes)


@pytest.mark.parametrize("num_levels", [3, 4, 6])
def test_levels_halve(num_levels):
    levels = make(num_levels=num_levels)(torch.randn(2, 3, 76, 100))
    sizes, (height, width) = [], (10, 13)
    for _ in range(num_levels):
        sizes.append((2, 16, height, width))
        height, width = -(-height // 2), -(-width // 2)
    assert [tuple(level.shape) for level in levels] == sizes


def test_extra_levels():
    """The first comes from the raw last map, each further one from the projected level before it."""
    neck, images = make(num_levels=5), torch.randn(1, 3, 64, 64)
    levels, raw = neck(images), neck.backbone(images)["res5"]
    torch.testing.assert_close(levels[3], neck.extra_levels[0](raw))
    torch.testing.assert_close(levels[4], neck.extra_levels[1](levels[3]))
    assert neck.extra_levels[0][0].in_channels == 8
    assert neck.extra_levels[1][0].in_channels == 16


def test_projection_is_convolution_and_norm():
    neck, images = make(num_levels=4), torch.randn(1, 3, 64, 64)
    (conv, norm), raw = neck.lateral[0], neck.backbone(images)["res3"]
    expected = F.group_norm(F.conv2d(raw, conv.weight, conv.bias), 4, norm.weight, norm.bias, eps=1e-5)
    torch.testing.assert_close(neck(images)[0], expected)
    assert not conv.bias.any()
    # Xavier: uniform within sqrt(6 / (fan in + fan out)).
    bound = (6 / (4 + 16)) ** 0.5
    assert 0.8 * bound < conv.weight.abs().max() <= bound


def test_some_features():
    neck = make(in_features=["res4"], num_levels=2)
    assert [tuple(level.shape[-2:]) for level in neck(torch.randn(1, 3, 64, 64))] == [(4, 4), (2, 2)]


def test_five_levels_of_four_features():
    class FourFeatures(TinyBackbone):
        def __init__(self):
            super().__init__()
            self.res6 = torch.nn.Conv2d(8, 10, 3, stride=2, padding=1)

        def output_shape(self):
            return super().output_shape() | {"res6": FeatureShape(10, 64)}

    neck = make(backbone=FourFeatures(), in_features=[*FEATURES, "res6"], num_levels=5)
    assert len(neck(torch.randn(1, 3, 128, 128))) == 5
    assert len(neck.lateral) == 4
    assert len(neck.extra_levels) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": ["res3", "p9"]}, r"in_features \['res3', 'p9'\]: the backbone has \['res3', 'res4', 'res5'\]"),
        ({"in_features": []}, "the backbone has"),
        ({"in_features": ["res5", "res4"]}, "from the finest to the coarsest"),
        ({"num_levels": 2}, "num_levels 2 is less than"),
        ({"out_channels": 18}, "out_channels 18 is not a multiple of norm_groups 4"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
