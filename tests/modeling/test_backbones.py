import pytest
import torch

from dino.modeling import TorchvisionBackbone

NAMES = ["res2", "res3", "res4", "res5"]


def test_channels_and_strides():
    shapes = TorchvisionBackbone("resnet50", out_features=NAMES).output_shape()
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        "res2": (256, 4),
        "res3": (512, 8),
        "res4": (1024, 16),
        "res5": (2048, 32),
    }


def test_default_features():
    assert list(TorchvisionBackbone("resnet18").output_shape()) == NAMES[1:]


@torch.no_grad()
def test_odd_sizes_are_rounded_up():
    backbone = TorchvisionBackbone("resnet18", out_features=NAMES).eval()
    height, width = 45, 71
    maps = backbone(torch.zeros(1, 3, height, width))
    for name, (channels, stride) in backbone.output_shape().items():
        assert maps[name].shape == (1, channels, -(-height // stride), -(-width // stride))


def test_frozen_norms_have_no_parameters():
    names = [name for name, _ in TorchvisionBackbone("resnet18").named_parameters()]
    assert not [name for name in names if "bn" in name or "downsample.1" in name]


def test_norms_can_be_trained_and_measuring_leaves_them_alone():
    backbone = TorchvisionBackbone("resnet18", norm="BN")
    assert all(module.training for module in backbone.modules())
    assert backbone.body.bn1.weight.requires_grad
    assert backbone.body.bn1.num_batches_tracked == 0


def test_freeze():
    backbone = TorchvisionBackbone("resnet18", freeze=["conv1", "bn1", "layer1"])
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    frozen = {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_errors():
    with pytest.raises(ValueError, match="unknown ResNet 'resnet49'"):
        TorchvisionBackbone("resnet49")
    with pytest.raises(ValueError, match=r"unknown out_features \['layer4'\]"):
        TorchvisionBackbone("resnet18", out_features=["res3", "layer4"])
    with pytest.raises(ValueError, match=r"nothing to freeze.*'layer9'"):
        TorchvisionBackbone("resnet18", freeze=["layer9"])
