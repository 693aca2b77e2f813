import pytest
import torch
import torchvision

from dino.modeling import share_heads
from dino.weights import from_official, rename, resnet_to_detectron2, resnet_to_torchvision

from .tiny import random_batch, tiny_network

MLP_LAYERS = {"0": "0", "2": "1", "4": "2"}
OFFICIAL_LAYER_NAMES = {
    "encoder": {
        "attention": "self_attn",
        "norm": "norm1",
        "feed_forward.norm": "norm2",
        "feed_forward.linear1": "linear1",
        "feed_forward.linear2": "linear2",
    },
    "decoder": {
        "self_attention": "self_attn",
        "cross_attention": "cross_attn",
        "self_norm": "norm2",
        "cross_norm": "norm1",
        "feed_forward.norm": "norm3",
        "feed_forward.linear1": "linear1",
        "feed_forward.linear2": "linear2",
    },
}


def official_name(own):
    """The opposite of the table under test, written on its own and with string operations only."""
    part, _, rest = own.partition(".")
    if part == "level_embed":
        return "transformer.level_embed"
    if part == "neck":
        kind, _, rest = rest.partition(".")
        if kind == "backbone":
            return f"backbone.0.{rest}"
        level, _, rest = rest.partition(".")
        return f"input_proj.{int(level) + (3 if kind == 'coarser' else 0)}.{rest}"
    if part == "denoising":
        return "label_enc.weight"
    if rest.startswith("layers."):
        _, layer, name = rest.split(".", 2)
        names = OFFICIAL_LAYER_NAMES[part]
        key = max((k for k in names if name.startswith(f"{k}.")), key=len)
        return f"transformer.{part}.layers.{layer}.{names[key]}{name.removeprefix(key)}"
    words = rest.split(".")
    leaf = words[-1]
    if part == "query_selection":
        return {
            "project": f"transformer.enc_output{'_norm' if words[1] == '1' else ''}.{leaf}",
            "class_head": f"transformer.enc_out_class_embed.{leaf}",
            "box_head": f"transformer.enc_out_bbox_embed.layers.{MLP_LAYERS.get(words[1])}.{leaf}",
            "content": "transformer.tgt_embed.weight",
        }[words[0]]
    return {
        "norm": f"transformer.decoder.norm.{leaf}",
        "position": f"transformer.decoder.ref_point_head.layers.{MLP_LAYERS.get(words[1])}.{leaf}",
        "class_heads": f"class_embed.{words[1]}.{leaf}",
        "box_heads": f"bbox_embed.{words[1]}.layers.{MLP_LAYERS.get(words[-2])}.{leaf}",
    }[words[0]]


def official_state(model):
    """As the official program saves it: heads under two names, and one label more."""
    state = {official_name(own): value.clone() for own, value in model.state_dict().items()}
    heads = [name for name in state if name.startswith(("bbox_embed.", "class_embed."))]
    state |= {f"transformer.decoder.{name}": state[name] for name in heads}
    labels = state["label_enc.weight"]
    state["label_enc.weight"] = torch.cat([labels, torch.full_like(labels[:1], 9.0)])
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_round_trip(prefix):
    model = tiny_network()
    share_heads(model.decoder)
    state = {f"{prefix}{name}": value for name, value in official_state(model).items()}
    own = from_official(state)
    assert set(own) == set(model.state_dict())
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_shared_official_heads_load_into_separate_ones():
    source, target = tiny_network(), tiny_network().eval()
    share_heads(source.decoder).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    target.load_state_dict(from_official(official_state(source)))
    assert target.decoder.box_heads[0] is not target.decoder.box_heads[1]
    batch = random_batch(2)
    torch.testing.assert_close(target(*batch).decoder.boxes, source(*batch).decoder.boxes)


def test_unknown_keys_stay():
    assert list(from_official({"something.else": torch.zeros(1)})) == ["something.else"]


def test_names_must_not_collide():
    with pytest.raises(ValueError, match="would be called 'b', the second is 'b'"):
        rename({"a": torch.zeros(1), "b": torch.zeros(1)}, ((r"^a$", "b"),))


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
