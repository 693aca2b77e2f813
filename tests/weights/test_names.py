import pytest
import torch
import torchvision

from dino.weights import resnet_to_detectron2, resnet_to_torchvision
from dino.weights.names import rename, rules


def test_the_first_rule_that_fits_the_whole_key_counts():
    table = rules([("a.{i}.x.*", "b.x{i}.*"), ("a.*", "c.*")])
    state = {name: torch.zeros(1) for name in ("a.12.x.y.z", "a.12.x", "z.a.1.x.y")}
    assert list(rename(state, table)) == ["b.x12.y.z", "c.12.x", "z.a.1.x.y"]


def test_names_must_not_collide():
    with pytest.raises(ValueError, match="would be called 'b', the second is 'b'"):
        rename({"a": torch.zeros(1), "b": torch.zeros(1)}, rules([("a", "b")]))


def test_resnet_examples():
    own = {
        "neck.backbone.body.conv1.weight": "neck.backbone.stem.conv1.weight",
        "neck.backbone.body.bn1.running_var": "neck.backbone.stem.conv1.norm.running_var",
        "neck.backbone.body.layer1.0.conv1.weight": "neck.backbone.res2.0.conv1.weight",
        "neck.backbone.body.layer4.2.bn3.bias": "neck.backbone.res5.2.conv3.norm.bias",
        "neck.backbone.body.layer3.0.downsample.0.weight": "neck.backbone.res4.0.shortcut.weight",
        "neck.backbone.body.layer3.0.downsample.1.bias": "neck.backbone.res4.0.shortcut.norm.bias",
        "decoder.layers.0.self_norm.weight": "decoder.layers.0.self_norm.weight",
        "neck.lateral.0.0.weight": "neck.lateral.0.0.weight",
    }
    state = {name: torch.tensor(i) for i, name in enumerate(own)}
    assert list(resnet_to_detectron2(state)) == list(own.values())
    assert resnet_to_torchvision(resnet_to_detectron2(state)) == state
    named = resnet_to_detectron2(state)
    assert list(resnet_to_detectron2(named)) == list(named)  # Detectron2's names stay


def test_resnet_files_of_torchvision_have_no_prefix():
    with torch.device("meta"):
        state = torchvision.models.resnet18().state_dict()
    names = list(resnet_to_detectron2(state))
    assert names[0] == "stem.conv1.weight"
    assert "res2.1.conv2.norm.running_mean" in names
    assert not [name for name in names if "layer" in name or "bn" in name]
    assert next(iter(resnet_to_torchvision(resnet_to_detectron2(state)))) == "body.conv1.weight"


@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_of_detectron2_computes_the_same(depth):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet

    from dino.modeling import TorchvisionBackbone

    ours = TorchvisionBackbone(f"resnet{depth}", out_features=["res2", "res3", "res4", "res5"]).eval()
    for name, buffer in ours.named_buffers():
        buffer.uniform_(0.5, 1) if name.endswith(("weight", "var")) else buffer.normal_(std=0.1)
    where = {"stride_in_1x1": False} if depth >= 50 else {}  # of a bottleneck; the blocks below 50 layers have none
    stages = ResNet.make_default_stages(depth, norm="FrozenBN", **where)
    theirs = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res2", "res3", "res4", "res5"]).eval()
    theirs.load_state_dict(resnet_to_detectron2(ours.state_dict()))
    images = torch.randn(1, 3, 61, 70)
    expected = theirs(images)
    for name, features in ours(images).items():
        torch.testing.assert_close(features, expected[name], rtol=1e-4, atol=1e-4)
    assert set(resnet_to_torchvision(theirs.state_dict())) == set(ours.state_dict())
