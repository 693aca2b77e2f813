import pytest
import torch
import torchvision
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


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_torchvision(norm_layer):
    compare(TorchvisionBackbone("resnet18", norm_layer=norm_layer), 20, lambda maps: maps.values())


def test_detectron2():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import ResNet
    from detectron2.modeling.backbone import BasicStem

    stages = ResNet.make_default_stages(depth=50, stride_in_1x1=False, norm="FrozenBN")
    stem = BasicStem(in_channels=3, out_channels=64, norm="FrozenBN")
    compare(ResNet(stem=stem, stages=stages, out_features=["res3", "res5"]), 53, lambda maps: maps.values())


def test_a_map_that_is_also_used_without_the_norm_keeps_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images):
            maps = self.conv(images)
            return self.norm(maps) + maps

    compare(torch.fx.symbolic_trace(Model().eval()), 0)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        fold_norms(TorchvisionBackbone("resnet18").train())
