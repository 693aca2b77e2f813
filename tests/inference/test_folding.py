import pytest
import torch
from torch import nn

from dino.modeling import TorchvisionBackbone, fold_norms


def randomise(model):
    """Statistics as after training, not 0 and 1."""
    torch.manual_seed(0)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight")):
            x.data.uniform_(0.5, 1.5)
        elif x.is_floating_point() and x.dim() == 1:
            x.data.normal_(std=0.2)


def compare(model, count, of=lambda y: y):
    randomise(model.eval())
    images = torch.randn(1, 3, 64, 72)
    with torch.no_grad():
        before = of(model(images))
        assert fold_norms(model) == count
        after = of(model(images))
    assert fold_norms(model) == 0
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize(("name", "norm", "count"), [("resnet18", "BN", 20), ("resnet50", "FrozenBN", 53)])
def test_torchvision(name, norm, count):
    compare(TorchvisionBackbone(name, norm=norm), count, lambda maps: maps.values())


def test_efficientnet():
    model = TorchvisionBackbone("efficientnet_b0", norm="BN")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    compare(model, norms, lambda maps: maps.values())


def test_detectron2():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import ResNet
    from detectron2.modeling.backbone import BasicStem

    stages = ResNet.make_default_stages(depth=50, stride_in_1x1=False, norm="FrozenBN")
    stem = BasicStem(in_channels=3, out_channels=64, norm="FrozenBN")
    compare(ResNet(stem=stem, stages=stages, out_features=["res3", "res5"]), 53, lambda maps: maps.values())


class NormAndActivation(nn.BatchNorm2d):
    """As timm's: more than a norm."""

    def forward(self, maps):
        return super().forward(maps).relu()


def test_a_norm_of_another_kind_stays():
    compare(nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4)), 0)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        fold_norms(TorchvisionBackbone("resnet18").train())
