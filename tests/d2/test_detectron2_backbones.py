"""Every kind of backbone, exchanged by two statements of a recipe, trained for two steps and evaluated."""

import json

import pytest

from dino.weights import network_parts

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import FPN, MViT, ResNet, SimpleFeaturePyramid, SwinTransformer
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from omegaconf import OmegaConf
from torch import nn

from dino.d2.detectron2_backbones import AsBackbone, dilated_stages, regnet, vitdet
from dino.d2.training import engine
from dino.modeling import ChannelMapper, TimmBackbone, TorchvisionBackbone
from dino.modeling.backbones import extract, padding_of
from dino.training.memory_saving import checkpoint_activations
from dino.training.recipe_nodes import plain
from dino.weights.names import resnet_to_detectron2

from .recipes import tiny_recipe

R = ["res2", "res3", "res4", "res5"]
P = ["p2", "p3", "p4", "p5", "p6"]


def resnet(depth, features=R[1:]):
    stages = {"depth": depth, "norm": "BN", **({} if depth < 50 else {"stride_in_1x1": False})}
    return L(ResNet)(
        stem=L(BasicStem)(norm="BN"), stages=L(ResNet.make_default_stages)(**stages), out_features=features
    )


def dilated_resnet():
    stages = L(dilated_stages)(depth=50, norm="BN")
    return L(ResNet)(stem=L(BasicStem)(norm="BN"), stages=stages, out_features=R[1:])


def swin(indices):
    return L(SwinTransformer)(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], out_indices=indices)


def mvit(features):
    return L(MViT)(embed_dim=24, depth=6, last_block_indexes=[0, 1, 4, 5], out_features=features, img_size=64)


def small_regnet(features):
    return L(regnet)(depth=6, w_a=20.0, w_0=16, w_m=2.2, group_width=8, out_features=features, norm="BN", freeze_at=0)


def vit(scales):
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "global_blocks": [1], "img_size": 64, "window_size": 3}
    return L(vitdet)(**sizes, scale_factors=scales, out_channels=32)


def timm_pyramid(name):
    net = L(AsBackbone)(net=L(TimmBackbone)(name=name, out_features=["res4"], options={"depth": 3}))
    scales = [2.0, 1.0, 0.5]
    return L(SimpleFeaturePyramid)(net=net, in_feature="res4", out_channels=32, scale_factors=scales)


def fpn(bottom_up, features, **options):
    return L(FPN)(bottom_up=bottom_up, in_features=features, out_channels=32, **options)


# name: (first statement, second statement)
BACKBONES = {
    "ResNet-18": (resnet(18), R[1:]),
    "ResNet-18, 5 levels": (resnet(18, R), R),
    "ResNet-50": (resnet(50), R[1:]),
    "ResNet-101": (resnet(101), R[1:]),
    "ResNet-50, dilated": (dilated_resnet(), R[1:]),
    "RegNet": (small_regnet(["s2", "s3", "s4"]), ["s2", "s3", "s4"]),
    "RegNet, 5 levels": (small_regnet(["s1", "s2", "s3", "s4"]), ["s1", "s2", "s3", "s4"]),
    "Swin": (swin([1, 2, 3]), ["p1", "p2", "p3"]),
    "Swin, 5 levels": (swin([0, 1, 2, 3]), ["p0", "p1", "p2", "p3"]),
    "MViTv2": (mvit(["scale3", "scale4", "scale5"]), ["scale3", "scale4", "scale5"]),
    "MViTv2, 5 levels": (mvit([f"scale{i}" for i in (2, 3, 4, 5)]), [f"scale{i}" for i in (2, 3, 4, 5)]),
    "ViTDet": (vit([2.0, 1.0, 0.5]), P[1:]),
    "ViTDet, 5 levels": (vit([4.0, 2.0, 1.0, 0.5]), P),
    "FPN of a ResNet": (fpn(resnet(18), R[1:], top_block=L(LastLevelMaxPool)()), P[1:]),
    "FPN of a Swin": (fpn(swin([1, 2, 3]), ["p1", "p2", "p3"]), P[1:4]),
    "FPN of a ConvNeXt": (fpn(L(AsBackbone)(net=L(TorchvisionBackbone)(name="convnext_tiny")), R[1:]), P[1:4]),
    "pyramid of timm's ViT": (timm_pyramid("vit_tiny_patch16_224"), P[1:4]),
    "torchvision ResNet": (L(TorchvisionBackbone)(name="resnet18", norm="BN"), R[1:]),
    "torchvision ConvNeXt": (L(TorchvisionBackbone)(name="convnext_tiny"), R[1:]),
    "torchvision Swin v2": (L(TorchvisionBackbone)(name="swin_v2_t"), R[1:]),
    "torchvision EfficientNet": (L(TorchvisionBackbone)(name="efficientnet_b0", norm="BN"), R[1:]),
    "timm MobileNetV3": (L(TimmBackbone)(name="tf_mobilenetv3_small_075", norm="BN"), R[1:]),
    "timm FocalNet": (L(TimmBackbone)(name="focalnet_tiny_srf", out_features=R), R),
    "timm EVA-02": (L(TimmBackbone)(name="eva02_tiny_patch14_224", out_features=["stride14"]), ["stride14"]),
    "timm ConvNeXt": (L(TimmBackbone)(name="convnext_atto"), R[1:]),
}
QUICK = ["Swin", "ViTDet", "timm MobileNetV3"]  # the others are slow
NEED_NO_TIMM = ("ResNet", "RegNet", "torchvision", "FPN of a ResNet", "FPN of a ConvNeXt")


def cases(quick=()):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]


def statements(name):
    """Copies of both, for recipes change what they are given."""
    if not name.startswith(NEED_NO_TIMM):
        pytest.importorskip("timm", reason="timm is not installed")
    backbone, features = BACKBONES[name]
    return backbone.copy(), list(features)


def use(cfg, backbone, features):
    """The two statements, and the levels where they are not four."""
    neck = cfg.model.network.neck
    neck.backbone = backbone
    neck.in_features = features
    neck.num_levels = max(4, len(features) + (features[0] in ("res2", "s1", "p0", "scale2")))


@pytest.mark.parametrize("name", cases(QUICK))
def test_trains_and_evaluates(name, tmp_path):
    cfg = tiny_recipe(tmp_path, "train.max_iter=2", width=75, height=59)
    use(cfg, *statements(name))
    cfg.dataloader.train.mapper.augmentations = []  # the odd sizes reach the backbone
    cfg.dataloader.test.mapper.augmentations = []
    results = engine.train(cfg, resume=False)
    assert 0 <= results["bbox"]["AP"] <= 100
    again = LazyConfig.load(f"{cfg.train.output_dir}/config.yaml")
    assert type(instantiate(again.model.network.neck.backbone)) is type(instantiate(cfg.model.network.neck.backbone))


@pytest.mark.parametrize("name", cases([*QUICK, "ResNet-18", "RegNet", "MViTv2", "FPN of a ResNet"]))
def test_whole_maps_and_a_gradient_for_every_parameter(name):
    """For images whose sides no stride divides, so that no parameter is left over in distributed training."""
    backbone, features = statements(name)
    neck = ChannelMapper(
        backbone=instantiate(backbone), in_features=features, out_channels=32, num_levels=len(features) + 1
    )
    levels = neck(torch.randn(2, 3, 59, 75))
    strides = [neck.backbone.output_shape()[f].stride for f in features]
    for stride, level in zip(strides, levels, strict=False):
        assert level.shape[-2:] == (-(-59 // stride), -(-75 // stride))
    sum(level.square().mean() for level in levels).backward()
    without = {name for name, p in neck.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


@pytest.mark.parametrize("name", cases([*QUICK, "ResNet-18", "RegNet", "MViTv2", "FPN of a ResNet"]))
def test_checkpointing_changes_no_gradient(name):
    backbone = instantiate(statements(name)[0]).eval()  # without random depth; its running statistics stand still
    images, names = torch.randn(1, 3, 64, 96), [name for name, _ in backbone.named_parameters()]

    def gradients():
        backbone.zero_grad()
        maps = extract(backbone, images, padding_of(backbone))
        sum(m.square().mean() for m in maps.values()).backward()
        return {key: p.grad.clone() for key, p in zip(names, backbone.parameters(), strict=True) if p.requires_grad}

    plain = gradients()
    whole = nn.ModuleDict({"network": nn.ModuleDict({"neck": nn.ModuleDict({"backbone": backbone})})})
    checkpoint_activations(whole, ["backbone"])
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for key, values in plain.items():
        torch.testing.assert_close(checkpointed[key], values, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", BACKBONES)
def test_statements_are_plain_text(name, tmp_path):
    """Names and numbers only, so that a checkpoint can carry them."""
    LazyConfig.save(OmegaConf.create({"backbone": BACKBONES[name][0]}), str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert json.loads(json.dumps(OmegaConf.to_container(again))) == OmegaConf.to_container(again)


@pytest.mark.parametrize("name", cases([*QUICK, "RegNet", "pyramid of timm's ViT"]))
def test_checkpoints_can_describe_them(name):
    """Built again from the JSON text that a checkpoint carries, with the same parameters."""
    if name.startswith(("ResNet", "FPN of a ResNet")):
        pytest.skip(
            "Detectron2's ResNet becomes torchvision's, under other names: see tests/weights/test_description.py"
        )
    backbone = statements(name)[0]
    again = network_parts._build(json.loads(json.dumps(plain(OmegaConf.to_container(backbone)))))
    shapes = {key: value.shape for key, value in instantiate(backbone).state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


def test_the_faults_of_detectron2_are_known():
    """What these backbones say of themselves, and what they get."""
    pytest.importorskip("timm", reason="timm is not installed")
    bare = instantiate(swin([1, 2, 3]))
    with pytest.raises(AttributeError):
        bare.size_divisibility  # noqa: B018
    assert padding_of(bare) == (1, 0)
    pyramid = instantiate(vit([2.0, 1.0, 0.5]))
    assert "size_divisiblity" in pyramid.padding_constraints
    assert padding_of(pyramid) == (32, 0)
    assert padding_of(instantiate(L(vitdet)(embed_dim=32, depth=1, num_heads=2, square_pad=256))) == (32, 256)
    assert padding_of(instantiate(fpn(resnet(18), R[1:]))) == (32, 0)
    assert padding_of(instantiate(resnet(18))) == (1, 0)


@torch.no_grad()
def test_the_dilated_resnet_computes_the_same_as_torchvisions():
    """Parameters of the undilated one, outputs and strides of torchvision's; also built from a description."""
    stem, stages = BasicStem(norm="FrozenBN"), dilated_stages(depth=50, norm="FrozenBN")
    theirs = ResNet(stem, stages, out_features=R[1:], freeze_at=2).eval()
    plain = ResNet.make_default_stages(50, norm="FrozenBN", stride_in_1x1=False)
    shapes = [
        {key: x.shape for key, x in nn.ModuleList(nn.Sequential(*blocks) for blocks in found).state_dict().items()}
        for found in (stages, plain)
    ]
    assert shapes[0] == shapes[1]
    assert {name: shape.stride for name, shape in theirs.output_shape().items()} == {"res3": 8, "res4": 16, "res5": 16}
    node = {"norm": "FrozenBN", "depth": 50, "_target_": "dino.d2.detectron2_backbones.dilated_stages"}
    described = {
        "_target_": "detectron2.modeling.ResNet",
        "stem": {"_target_": "detectron2.modeling.backbone.BasicStem"},
    }
    ours = network_parts._build({**described, "stages": node, "out_features": R[1:], "freeze_at": 2}).eval()
    assert isinstance(ours, TorchvisionBackbone)
    for name, buffer in ours.named_buffers():
        buffer.uniform_(0.5, 1) if name.endswith(("weight", "var")) else buffer.normal_(std=0.1)
    theirs.load_state_dict(resnet_to_detectron2(ours.state_dict()))
    images = torch.randn(1, 3, 61, 70)
    expected = theirs(images)
    for name, features in ours(images).items():
        torch.testing.assert_close(features, expected[name], rtol=1e-4, atol=1e-4)


def test_shallow_resnets_are_not_dilated():
    with pytest.raises(ValueError, match="a ResNet of depth 18 has no dilated form"):
        dilated_stages(depth=18)


def test_squares_that_are_too_small_crop_nothing():
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = instantiate(vit([2.0, 1.0, 0.5]))
    backbone._square_pad = 64
    neck = ChannelMapper(backbone=backbone, in_features=P[1:], out_channels=32, num_levels=4)
    assert neck(torch.randn(1, 3, 50, 130))[0].shape[-2:] == (7, 17)


def test_vitdet_is_published_vitdet():
    """Windows in all blocks but four, and the eps of the norms of MAE's weights."""
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = vitdet(depth=12, embed_dim=48, num_heads=2)
    windows = [block.window_size for block in backbone.net.blocks]
    assert [i for i, size in enumerate(windows) if size == 0] == [2, 5, 8, 11]
    assert set(windows) == {0, 14}
    assert backbone.net.blocks[0].norm1.eps == 1e-6
    assert list(backbone.output_shape()) == P[1:]
