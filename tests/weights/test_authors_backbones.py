"""ConvNeXt and FocalNet under their authors' names, as in detrex: equal maps from torchvision's and timm's networks."""

import re

import pytest
import torch
import torch.nn.functional as F

from dino.modeling import TimmBackbone, TorchvisionBackbone, build_dino
from dino.utils.files import DataError
from dino.weights import load_weights
from dino.weights.imagenet import fit_backbone

from .published_keys import convnext, focalnet

SMALL = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_classes": 3}
IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def random_state(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 1) for name, shape in shapes.items()
    }


class Network:
    """What the two networks have in common, on a state dict; maps are (B, channels, H, W)."""

    def __init__(self, state, eps):
        self.state, self.eps = state, eps

    def convolve(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def linear(self, name, x):
        return F.linear(x.movedim(1, 3), self.state[f"{name}.weight"], self.state[f"{name}.bias"]).movedim(3, 1)

    def norm(self, name, x):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, 3), weight.shape, weight, bias, self.eps).movedim(3, 1)

    def scale(self, name, x):
        return self.state[name][:, None, None] * x

    def blocks(self, front):
        numbers = {int(name.removeprefix(front).split(".")[0]) for name in self.state if name.startswith(front)}
        return [f"{front}{number}" for number in sorted(numbers)]


def convnext_maps(state, x):
    """detrex' maps of the stages 1 to 3."""
    net, maps = Network(state, 1e-6), []
    for stage in range(4):
        down = f"downsample_layers.{stage}"
        if stage == 0:
            x = net.norm(f"{down}.1", net.convolve(f"{down}.0", x, stride=4))
        else:
            x = net.convolve(f"{down}.1", net.norm(f"{down}.0", x), stride=2)
        for block in net.blocks(f"stages.{stage}."):
            y = net.norm(f"{block}.norm", net.convolve(f"{block}.dwconv", x, padding=3, groups=x.shape[1]))
            y = net.linear(f"{block}.pwconv2", F.gelu(net.linear(f"{block}.pwconv1", y)))
            x = x + net.scale(f"{block}.gamma", y)
        if stage:
            maps.append(net.norm(f"norm{stage}", x))
    return maps


def focalnet_maps(state, x, levels, first_map):
    """detrex' maps from stage `first_map` on, of a network whose norms follow the parts of a block."""
    net, maps = Network(state, 1e-5), []
    x = net.norm("patch_embed.norm", net.convolve("patch_embed.proj", x, stride=4, padding=2))
    for stage in range(4):
        for block in net.blocks(f"layers.{stage}.blocks."):
            y = net.norm(f"{block}.norm1", modulate(net, f"{block}.modulation", x, levels))
            x = x + net.scale(f"{block}.gamma_1", y)
            y = net.linear(f"{block}.mlp.fc2", F.gelu(net.linear(f"{block}.mlp.fc1", x)))
            x = x + net.scale(f"{block}.gamma_2", net.norm(f"{block}.norm2", y))
        if stage >= first_map:
            maps.append(net.norm(f"norm{stage}", x))
        if stage < 3:
            down = f"layers.{stage}.downsample"
            x = net.norm(f"{down}.norm", net.convolve(f"{down}.proj", x, stride=2, padding=1))
    return maps


def modulate(net, name, x, levels):
    channels = x.shape[1]
    query, context, gates = net.linear(f"{name}.f", x).split([channels, channels, levels + 1], 1)
    total = 0
    for level in range(levels):
        kernel = f"{name}.focal_layers.{level}.0"
        size = net.state[f"{kernel}.weight"].shape[-1]
        context = F.gelu(net.convolve(kernel, context, padding=size // 2, groups=channels))
        total = total + context * gates[:, level : level + 1]
    total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, levels:]
    return net.linear(f"{name}.proj", query * net.convolve(f"{name}.h", total))


@torch.no_grad()
def check_maps(backbone, state, expected):
    """All tensors fit, under detectors' front too, and the maps are the expected ones."""
    named = fit_backbone({f"backbone.{name}": value for name, value in state.items()}, backbone)
    assert {name: value.shape for name, value in backbone.state_dict().items()} == {
        k: v.shape for k, v in named.items()
    }
    backbone.load_state_dict(named)
    for found, map_ in zip(backbone.eval()(IMAGES).values(), expected, strict=True):
        torch.testing.assert_close(found, map_, rtol=1e-4, atol=1e-4)


def test_convnext_in_torchvisions_network():
    state = random_state(convnext(96, (3, 3, 9, 3)))
    check_maps(TorchvisionBackbone("convnext_tiny", map_norm="LN"), state, convnext_maps(state, IMAGES))


@pytest.mark.parametrize("options", [{"conv_mlp": True}, {"conv_mlp": False}])  # 1x1 convolutions, or Linear layers
def test_convnext_in_timms_network(options):
    pytest.importorskip("timm", reason="timm is not installed")
    state = random_state(convnext(40, (2, 2, 6, 2)))
    backbone = TimmBackbone("convnext_atto", map_norm="LN", options=options)
    check_maps(backbone, state, convnext_maps(state, IMAGES))


@pytest.mark.parametrize("front", ["module.", "backbone.0.", "backbone.0.body.", "body.", "model.backbone."])
def test_prefixes_of_a_convnext(front):
    pytest.importorskip("timm", reason="timm is not installed")
    state = random_state(convnext(40, (2, 2, 6, 2)))
    backbone = TimmBackbone("convnext_atto", map_norm="LN")
    report = load_weights(build_dino(backbone=backbone, **SMALL), {front + key: x for key, x in state.items()})
    assert (report.format, report.unexpected) == ("backbone", [])
    assert not [name for name in report.missing if "backbone" in name]
    assert torch.equal(backbone.body.stages_2.downsample[1].weight, state["downsample_layers.2.1.weight"])


def test_a_detector_with_a_convnext():
    """As the official program stores it: the backbone is a part of a list."""
    pytest.importorskip("timm", reason="timm is not installed")
    network, theirs = (build_dino(backbone=TimmBackbone("convnext_atto", map_norm="LN"), **SMALL) for _ in range(2))
    state = {k: v for k, v in theirs.state_dict().items() if "backbone" not in k}
    meta = random_state(convnext(40, (2, 2, 6, 2)))
    for front in ("neck.backbone.", "neck.backbone.body."):
        report = load_weights(network, state | {front + key: x for key, x in meta.items()})
        assert (report.format, report.problems, report.unexpected) == ("own", [], [])
        assert torch.equal(network.neck.backbone.body.stem_0.weight, meta["downsample_layers.0.0.weight"])


def test_convnext_v2_in_timms_network():
    """Its response normalisation, whose scales its authors write as (1, 1, 1, C)."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    whole = timm.create_model("convnextv2_atto")
    whole.load_state_dict(random_state({name: x.shape for name, x in whole.state_dict().items()}))
    theirs = {convnext_name(name): as_written(name, x) for name, x in whole.state_dict().items()}
    backbone = TimmBackbone("convnextv2_atto")
    report = load_weights(build_dino(backbone=backbone, **SMALL), {"model": theirs})
    assert not [name for name in report.missing if "backbone" in name]
    assert len([name for name in report.loaded if ".grn." in name]) == 24
    maps = whole.eval().forward_intermediates(IMAGES, intermediates_only=True)[1:]
    for found, expected in zip(backbone.eval()(IMAGES).values(), maps, strict=True):
        torch.testing.assert_close(found, expected)


def as_written(name, x):
    """A tensor of timm's ConvNeXt V2 with its authors' shape."""
    x = x[:, :, 0, 0] if ".mlp.fc" in name and x.ndim == 4 else x
    return x[None, None, None] if ".grn." in name else x


def convnext_name(name):
    """A name of timm's ConvNeXt as its authors have it."""
    for ours, theirs in (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"\.blocks\.", "."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc", ".pwconv"),
        (r"\.mlp\.grn\.weight", ".grn.gamma"),
        (r"\.mlp\.grn\.bias", ".grn.beta"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    ):
        name = re.sub(ours, theirs, name)
    return name


def test_messages_list_the_backbones_own_keys():
    """Those of the file as it has them, and none of the detector around."""
    meta = random_state(convnext(40, (2, 2, 6, 2)))
    network = build_dino(backbone=TorchvisionBackbone("resnet18"), **SMALL)
    detector = {k: v for k, v in network.state_dict().items() if "backbone" not in k}
    for front, rest, shown in (("", {}, ""), ("backbone.", {}, "backbone."), ("neck.backbone.", detector, "")):
        named = ", ".join(shown + key for key in list(meta)[:3])
        with pytest.raises(DataError, match=r"The model needs body\.conv1\.weight, ") as refused:
            load_weights(network, rest | {front + key: value for key, value in meta.items()})
        assert f"; the file has {named} and {len(meta) - 3} more. " in str(refused.value)
    with pytest.raises(DataError, match="the file has none"):
        load_weights(network, detector)


@pytest.mark.parametrize(("levels", "window", "first_map"), [(3, 5, 1), (4, 3, 0)])
def test_focalnet_in_timms_network(levels, window, first_map):
    pytest.importorskip("timm", reason="timm is not installed")
    state = random_state(focalnet(levels, window, first_map, width=96, depths=(2, 2, 6, 2)))
    options = {"focal_levels": [levels] * 4, "focal_windows": [window] * 4, "use_post_norm": True}
    options |= {"use_overlap_down": True, "layerscale_value": 1e-4}
    features = ["res2", "res3", "res4", "res5"][first_map:]
    backbone = TimmBackbone("focalnet_tiny_srf", out_features=features, map_norm="LN", options=options)
    check_maps(backbone, state, focalnet_maps(state, IMAGES, levels, first_map))


def test_norms_before_a_focalnets_parts_keep_their_names():
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = TimmBackbone("focalnet_tiny_lrf")
    theirs = {
        "layers.0.blocks.0.modulation.f.weight": torch.full((196, 96), 1.0),
        "layers.0.blocks.0.norm1.weight": torch.full((96,), 2.0),
        "layers.2.downsample.norm.bias": torch.full((768,), 3.0),
        "patch_embed.proj.bias": torch.full((96,), 4.0),
    }
    named = fit_backbone(theirs, backbone)
    assert {name: float(value.flatten()[0]) for name, value in named.items()} == {
        "body.layers_0.blocks.0.modulation.f.weight": 1,
        "body.layers_0.blocks.0.norm1.weight": 2,
        "body.layers_3.downsample.norm.bias": 3,
        "body.stem.proj.bias": 4,
    }
    assert named["body.layers_0.blocks.0.modulation.f.weight"].shape == (196, 96, 1, 1)


def test_an_authors_classifier_has_no_norms_of_maps():
    """They keep their initial values, and the classifier's last norm is none of them."""
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = TimmBackbone("convnext_atto", map_norm="LN")
    network = build_dino(backbone=backbone, **SMALL)
    state = {name: value for name, value in random_state(convnext(40, (2, 2, 6, 2))).items() if name[:4] != "norm"}
    state |= {"norm.weight": torch.zeros(320), "norm.bias": torch.zeros(320), "head.weight": torch.zeros(1000, 320)}
    report = load_weights(network, {"model": state})
    assert report.format == "backbone"
    assert report.missing == [
        f"neck.backbone.norms.res{stage}.{leaf}" for stage in (3, 4, 5) for leaf in ("weight", "bias")
    ]
    assert len(report.unexpected) == 3
    assert backbone.norms["res5"].weight.eq(1).all()


def test_a_checkpoint_keeps_its_norms_of_maps():
    first, second = (build_dino(backbone=TorchvisionBackbone("resnet18", map_norm="LN"), **SMALL) for _ in range(2))
    torch.nn.init.normal_(first.neck.backbone.norms["res4"].weight)
    assert load_weights(second, first.state_dict()).problems == []
    assert torch.equal(second.neck.backbone.norms["res4"].weight, first.neck.backbone.norms["res4"].weight)
