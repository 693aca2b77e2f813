import sys

import pytest
import torch
import torchvision
from torch import nn

from dino.modeling import ChannelMapper, TimmBackbone, TorchvisionBackbone
from dino.modeling.backbones import FeatureShape, Padding, extract, padding_of

from ..tiny import default_criterion, random_batch, random_targets, tiny_network

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
    with pytest.raises(ValueError, match=r"unknown torchvision backbone 'resnet49'; there are .*resnet50"):
        TorchvisionBackbone("resnet49")
    with pytest.raises(ValueError, match=r"unknown out_features \['layer4'\] of 'resnet18'; there are \['res2'"):
        TorchvisionBackbone("resnet18", out_features=["res3", "layer4"])
    with pytest.raises(ValueError, match="from the finest to the coarsest"):
        TorchvisionBackbone("resnet18", out_features=["res4", "res3"])
    with pytest.raises(ValueError, match=r"nothing to freeze.*'layer9'"):
        TorchvisionBackbone("resnet18", freeze=["layer9"])
    with pytest.raises(ValueError, match="unknown norm 'GN'; there are FrozenBN, BN"):
        TorchvisionBackbone("resnet18", norm="GN")


DC5 = {"res3": FeatureShape(512, 8), "res4": FeatureShape(1024, 16), "res5": FeatureShape(2048, 16)}


@torch.no_grad()
def test_a_dilated_stage_keeps_the_size_and_the_weights():
    """The numbers of the undilated ResNet up to `res4`, torchvision's own of its last stage; any size of the image."""
    plain, dilated = TorchvisionBackbone("resnet50").eval(), TorchvisionBackbone("resnet50", dilated=["res5"]).eval()
    assert dilated.output_shape() == DC5
    assert dilated.size_divisibility == 0
    dilated.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 59, 75)
    maps, expected = dilated(images), plain(images)
    assert [maps[name].shape[-2:] for name in DC5] == [(8, 10), (4, 5), (4, 5)]
    for name in ("res3", "res4"):
        torch.testing.assert_close(maps[name], expected[name])
    convolutions = [block.conv2 for block in dilated.body.layer4]
    assert [c.dilation for c in convolutions] == [(1, 1), (2, 2), (2, 2)]
    assert {c.stride for c in convolutions} == {(1, 1)}
    # Every second cell of a stage without stride is what the stride gives, as long as no dilation has followed.
    first = plain.body.layer4[0](expected["res4"])
    torch.testing.assert_close(dilated.body.layer4[0](maps["res4"])[..., ::2, ::2], first, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_levels_of_a_dilated_network():
    """Strides 8, 16, 16 and 32: the extra level comes from `res5`. Padding, anchors and boxes fit their images."""
    torch.manual_seed(0)
    network = tiny_network()
    backbone = TorchvisionBackbone("resnet50", dilated=["res5"])
    network.neck = ChannelMapper(backbone=backbone, in_features=list(DC5), out_channels=32, norm_groups=8)
    images, padding = random_batch(2, 96, 128)  # the second image has 72 x 96 pixels
    tokens = network.eval().tokenize(network.neck(images), padding)
    assert tokens.shapes == [(12, 16), (6, 8), (6, 8), (3, 4)]
    sides = torch.tensor([[12.0, 9.0], [6.0, 5.0], [6.0, 5.0], [3.0, 3.0]])  # of the second image in cells, as (w, h)
    torch.testing.assert_close(tokens.valid_sizes[1], sides)
    logits, usable = network.query_selection.anchors(tokens)
    levels = [x[0].split([h * w for h, w in tokens.shapes]) for x in (logits.sigmoid(), usable)]
    for level, (boxes, use) in enumerate(zip(*levels, strict=True)):
        assert use.all()
        torch.testing.assert_close(boxes[:, 2:], torch.full_like(boxes[:, 2:], 0.05 * 2**level))
    torch.testing.assert_close(levels[0][1][:, :2], levels[0][2][:, :2])  # centres of the two levels of one stride
    assert network(images, padding).decoder.boxes.isfinite().all()


def test_a_dilated_network_trains():
    torch.manual_seed(0)
    network = tiny_network()
    backbone = TorchvisionBackbone("resnet50", dilated=["res5"], freeze=["conv1", "layer1"])
    network.neck = ChannelMapper(backbone=backbone, in_features=list(DC5), out_channels=32, norm_groups=8)
    targets = random_targets(1, 2)
    losses = default_criterion()(network(*random_batch(2), targets), targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "dilated", "message"),
    [
        ("resnet50", ["layer4"], r"unknown dilated maps \['layer4'\] of 'resnet50'; there are res3, res4, res5"),
        ("resnet18", ["res5"], "'resnet18' has no dilated form: ResNets from resnet50 on have one"),
        ("convnext_tiny", ["res5"], "'convnext_tiny' has no dilated form"),
    ],
)
def test_what_can_not_be_dilated(name, dilated, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone(name, dilated=dilated)


@torch.no_grad()
def test_norms_of_maps():
    backbone = TorchvisionBackbone("resnet18", out_features=["res4", "res5"], map_norm="LN").eval()
    for feature in backbone(torch.randn(1, 3, 64, 96)).values():
        torch.testing.assert_close(feature.mean(1), torch.zeros(feature[:, 0].shape), rtol=0, atol=1e-4)
        torch.testing.assert_close(feature.var(1, correction=0), torch.ones(feature[:, 0].shape), rtol=0, atol=1e-2)
    assert list(backbone.norms) == ["res4", "res5"]
    assert len(TorchvisionBackbone("resnet18").norms) == 0
    with pytest.raises(ValueError, match="unknown map_norm 'BN'; there are none, LN"):
        TorchvisionBackbone("resnet18", map_norm="BN")


TORCHVISION = ["resnet18", "convnext_tiny", "swin_t", "swin_v2_t", "efficientnet_b0", "efficientnet_v2_s"]
STRIDED = ["res2", "res3", "res4", "res5"]
TIMM = {  # one of each family; those of one stride only are named with their map
    "tf_mobilenetv3_small_075": STRIDED,
    "focalnet_tiny_srf": STRIDED,
    "eva02_tiny_patch14_224": ["stride14"],
    "vit_tiny_patch16_224": ["res4"],
    "vit_small_patch16_dinov3": ["res4"],
    "swin_tiny_patch4_window7_224": STRIDED,
    "swinv2_tiny_window8_256": STRIDED,
    "convnext_atto": STRIDED,
    "maxvit_rmlp_pico_rw_256": STRIDED,
    "resnet10t": STRIDED,
    "regnetx_002": STRIDED,
    "efficientnet_lite0": STRIDED,
    "mobilenetv2_035": STRIDED,
    "pvt_v2_b0": STRIDED,
    "hgnetv2_b0": STRIDED,
    "ghostnet_050": STRIDED,
    "densenet121": STRIDED,
    "hrnet_w18_small": STRIDED,
    "mobilevit_xxs": STRIDED,
    "edgenext_xx_small": STRIDED,
    "fastvit_t8": STRIDED,
    "poolformer_s12": STRIDED,
    "mvitv2_tiny": STRIDED,
    "tiny_vit_5m_224": STRIDED,
    "davit_tiny": STRIDED,
}
QUICK = ["resnet18", "tf_mobilenetv3_small_075", "vit_tiny_patch16_224", "convnext_atto"]  # the others are slow


def cases(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check_in_a_neck(backbone, features, size=(75, 101)):
    """Maps of an odd image cover it whole, every parameter that is trained gets a gradient, no other."""
    neck = ChannelMapper(backbone=backbone, in_features=features, out_channels=32, num_levels=len(features) + 1)
    levels = neck(torch.randn(2, 3, *size))
    for name, level in zip(features, levels, strict=False):
        assert level.shape == (2, 32, *(-(-side // backbone.output_shape()[name].stride) for side in size))
    sum(level.square().mean() for level in levels).backward()
    assert not [name for name, p in neck.named_parameters() if (p.grad is None) == p.requires_grad]


@pytest.mark.parametrize("name", cases(TORCHVISION))
@pytest.mark.parametrize("features", [STRIDED[1:], STRIDED], ids=["4 levels", "5 levels"])
def test_torchvision_in_a_neck(name, features):
    backbone = TorchvisionBackbone(name, out_features=features, freeze=[])
    assert [backbone.output_shape()[f].stride for f in features] == [4, 8, 16, 32][-len(features) :]
    check_in_a_neck(backbone, features)


@pytest.mark.parametrize("name", cases(TIMM))
def test_timm_in_a_neck(name):
    pytest.importorskip("timm", reason="timm is not installed")
    check_in_a_neck(TimmBackbone(name, out_features=TIMM[name], norm="BN"), TIMM[name])


def test_an_efficientnet_ends_with_its_last_stage():
    assert TorchvisionBackbone("efficientnet_b0").output_shape()["res5"].channels == 320


def test_layers_behind_the_last_map_are_left_out():
    backbone = TorchvisionBackbone("resnet18", out_features=["res2", "res3"])
    assert not [name for name in backbone.state_dict() if "layer3" in name or "fc" in name]


@pytest.mark.parametrize(("name", "classifier"), [("resnet18", {"fc"}), ("convnext_tiny", {"classifier"})])
def test_torchvision_parameters_keep_their_names(name, classifier):
    """So that a file of torchvision fits behind `body.`."""
    theirs = {k for k in torchvision.models.get_model(name).state_dict() if not k.endswith("num_batches_tracked")}
    ours = set(TorchvisionBackbone(name).body.state_dict())
    assert ours <= theirs
    assert {key.split(".")[0] for key in theirs - ours} == classifier


def test_frozen_statistics_compute_what_batch_norm_computes():
    """With the statistics, scale and shift, and the eps, of the network itself: EfficientNet's is not torch's."""
    trained = TorchvisionBackbone("efficientnet_b0", norm="BN").eval()
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    frozen = TorchvisionBackbone("efficientnet_b0").eval()
    frozen.load_state_dict({k: v for k, v in trained.state_dict().items() if not k.endswith("num_batches_tracked")})
    images = torch.randn(1, 3, 64, 64)
    ours, theirs = frozen(images), trained(images)
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=1e-5)


def test_timm_layers_behind_the_last_map_are_left_out():
    pytest.importorskip("timm", reason="timm is not installed")
    check_in_a_neck(TimmBackbone("convnext_atto", out_features=["res2", "res3"]), ["res2", "res3"])


def test_timm_options():
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = TimmBackbone("vit_tiny_patch16_224", out_features=["res4"], options={"depth": 3, "embed_dim": 96})
    assert backbone.output_shape() == {"res4": FeatureShape(96, 16)}


def test_timm_errors():
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match="timm has no model 'resnett50'; the nearest are resnet50"):
        TimmBackbone("resnett50")
    for address in ("hf-hub:somebody/model", "timm/resnet18", "local-dir:/somewhere"):
        with pytest.raises(ValueError, match="timm has no model"):
            TimmBackbone(address)
    with pytest.raises(ValueError, match=r"unknown out_features \['res3', 'res5'\] .* there are \['res4'\]"):
        TimmBackbone("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"can't make a backbone of 'vit_tiny_patch16_224' with \{'colour': 3\}"):
        TimmBackbone("vit_tiny_patch16_224", out_features=["res4"], options={"colour": 3})


@pytest.mark.slow
def test_networks_of_a_fixed_size_are_refused():
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match="can't use this network for images of any size, even if padded"):
        TimmBackbone("coatnet_pico_rw_224")


def test_without_timm_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="'resnet10t' needs timm: pip install timm"):
        TimmBackbone("resnet10t")


class Recorder(nn.Module):
    """Notes the sizes of its images and returns a map of stride 8 that counts its cells."""

    def __init__(self, **attributes):
        super().__init__()
        self.sizes = []
        self.__dict__.update(attributes)

    def output_shape(self):
        return {"res3": FeatureShape(2, 8)}

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        cells = torch.arange(images.shape[-1] // 8).expand(images.shape[-2] // 8, -1)
        return {"res3": cells.float().expand(len(images), 2, -1, -1)}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, (1, 0)),
        ({"size_divisibility": 0, "padding_constraints": {}}, (1, 0)),
        ({"size_divisibility": -1}, (1, 0)),
        ({"size_divisibility": 32, "padding_constraints": {"square_size": 0}}, (32, 0)),
        ({"padding_constraints": {"size_divisibility": 16, "square_size": 64}}, (16, 64)),
        ({"padding_constraints": {"size_divisiblity": 32, "square_size": 1024}}, (32, 1024)),
    ],
)
def test_what_backbones_ask_for(attributes, expected):
    assert padding_of(Recorder(**attributes)) == expected


@pytest.mark.parametrize(
    ("padding", "size", "seen"),
    [
        (Padding(1, 0), (64, 80), (64, 80)),
        (Padding(32, 0), (64, 96), (64, 96)),
        (Padding(32, 0), (65, 90), (96, 96)),
        (Padding(32, 128), (65, 90), (128, 128)),
        (Padding(32, 100), (65, 90), (128, 128)),
        (Padding(32, 64), (65, 190), (96, 192)),  # larger than the square: whole, not cropped
    ],
)
def test_padding_goes_into_the_backbone_and_not_out_of_it(padding, size, seen):
    backbone = Recorder()
    (cells,) = extract(backbone, torch.ones(2, 3, *size), padding).values()
    assert backbone.sizes == [seen]
    assert cells.shape == (2, 2, -(-size[0] // 8), -(-size[1] // 8))


def test_padding_is_zero_at_the_right_and_the_bottom():
    class Identity(Recorder):
        def forward(self, images):
            self.seen = images
            return super().forward(images)

    backbone, images = Identity(size_divisibility=32), torch.randn(1, 3, 33, 40)
    extract(backbone, images, padding_of(backbone))
    assert torch.equal(backbone.seen[..., :33, :40], images)
    assert backbone.seen[..., 33:, :].abs().sum() + backbone.seen[..., 40:].abs().sum() == 0


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (75, 101), (33, 62)])
def test_padding_of_tensorflow_is_timms(size):
    """Strided convolutions of 3 and 5 pixels, on sides of any remainder, with timm's own network as the oracle."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    ours = TimmBackbone("tf_efficientnet_lite0", norm="BN").eval()
    ours.body.load_state_dict(theirs.state_dict(), strict=False)
    assert sum(type(module).__name__ == "_Conv2dSame" for module in ours.modules()) == 5
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        found, expected = ours(images), theirs(images)[-3:]
    for name, features in zip(("res3", "res4", "res5"), expected, strict=True):
        torch.testing.assert_close(found[name], features, rtol=0, atol=0)


def test_a_backbone_with_padding_of_tensorflow_is_exported_for_any_size():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = TimmBackbone("tf_efficientnet_lite0", out_features=["res3", "res4"]).eval()
    sides = {2: torch.export.Dim("height", min=64), 3: torch.export.Dim("width", min=64)}
    exported = torch.export.export(backbone, (torch.rand(1, 3, 96, 128),), dynamic_shapes=(sides,)).module()
    images = torch.rand(1, 3, 75, 102)
    for name, features in backbone(images).items():
        torch.testing.assert_close(exported(images)[name], features)
