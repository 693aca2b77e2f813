import pytest
import torch
from torch import nn

from dino.modeling import TorchvisionBackbone, build_dino
from dino.utils.files import DataError
from dino.weights import convert, load_weights, recognise
from dino.weights.mmdetection import classes_of, from_mmdetection, position_of, to_mmdetection

from ..tiny import tiny_network
from .states import equal, mmdetection_state, randomise
from .test_checkpoint_formats import resnet_network, shared_network


def network_without_bias(**options):
    """A network as mmdetection has it: no bias before the GroupNorms of the neck."""
    model = randomise(tiny_network(**options))
    for project in (*model.neck.lateral, *model.neck.extra_levels):
        nn.init.zeros_(project[0].bias)
    return model


@pytest.mark.parametrize("num_levels", [3, 4])
def test_mmdetection_to_own_and_back(num_levels):
    model = network_without_bias(num_levels=num_levels)
    theirs = mmdetection_state(model)
    assert recognise(theirs) == "mmdetection"
    assert equal(convert(theirs), model.state_dict())
    assert equal(convert(model.state_dict(), to="mmdetection"), theirs)


def test_biases_of_the_neck_are_kept():
    model = randomise(tiny_network())
    theirs = convert(model.state_dict(), to="mmdetection")
    assert equal(theirs, mmdetection_state(model, bias=True))
    assert equal(convert(theirs), model.state_dict())


@torch.no_grad()
def test_outputs_survive():
    source, target = network_without_bias().eval(), tiny_network().eval()
    report = load_weights(target, {"state_dict": mmdetection_state(source), "meta": {}})
    assert (report.format, report.problems, report.unexpected) == ("mmdetection", [], [])
    images, padding = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    assert torch.equal(target(images, padding).decoder.boxes, source(images, padding).decoder.boxes)


def test_the_published_model():
    """Names, and the number of keys, as in mmdetection 3.3; its ResNet counts batches."""
    model = resnet_network(num_classes=80)
    theirs = mmdetection_state(model)
    for name in [name for name in theirs if name.endswith("running_var")]:
        theirs[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    for name in (
        "backbone.layer4.2.bn3.num_batches_tracked",
        "neck.convs.2.gn.weight",
        "neck.extra_convs.0.conv.weight",
        "encoder.layers.5.self_attn.sampling_offsets.bias",
        "decoder.layers.5.self_attn.attn.in_proj_weight",
        "decoder.layers.0.ffn.layers.0.0.weight",
        "decoder.ref_point_head.layers.1.bias",
        "bbox_head.cls_branches.6.weight",
        "bbox_head.reg_branches.6.4.bias",
    ):
        assert name in theirs
    assert len(theirs) == 627
    target = resnet_network(num_classes=80)
    report = load_weights(target, theirs)
    assert (report.format, report.problems, report.unexpected) == ("mmdetection", [], [])
    assert equal(target.state_dict(), model.state_dict())


def patches(x):
    """Swin's own patch merging of an even map (B, H, W, C) -> (B, H/2 * W/2, 4C)."""
    parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.cat(parts, -1).flatten(1, 2)


def test_patch_merging():
    """mmdetection's `nn.Unfold` joins the same pixels in another order."""
    x = torch.randn(2, 6, 4, 5)
    theirs = nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2)).mT  # (B, 6, 4C)
    reduction, norm = torch.randn(10, 20), torch.randn(20)
    table = "neck.backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    own = {
        "neck.backbone.layers.0.downsample.reduction.weight": reduction,
        "neck.backbone.layers.0.downsample.norm.weight": norm,
        table: torch.randn(9, 2),
    }
    converted = to_mmdetection(own)
    assert converted.keys() == {
        "backbone.stages.0.downsample.reduction.weight",
        "backbone.stages.0.downsample.norm.weight",
        "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table",
    }
    other = theirs * converted["backbone.stages.0.downsample.norm.weight"]
    other = other @ converted["backbone.stages.0.downsample.reduction.weight"].T
    torch.testing.assert_close(other, patches(x) * norm @ reduction.T)
    assert equal(from_mmdetection(converted), own)


def test_a_swin():
    """Detectron2's has the names of Swin's own program."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import SwinTransformer

    sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 3}
    backbone = SwinTransformer(**sizes, out_indices=(1, 2, 3))
    options = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
    source, target = (
        build_dino(backbone=b, in_features=["p1", "p2", "p3"], num_levels=4, num_classes=3, **options)
        for b in (backbone, SwinTransformer(**sizes, out_indices=(1, 2, 3)))
    )
    theirs = convert(randomise(source).state_dict(), to="mmdetection")
    for name in (
        "backbone.patch_embed.projection.weight",
        "backbone.patch_embed.norm.weight",
        "backbone.stages.3.blocks.0.attn.w_msa.qkv.weight",
        "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index",
        "backbone.stages.0.blocks.0.ffn.layers.0.0.weight",
        "backbone.stages.0.blocks.0.ffn.layers.1.bias",
        "backbone.stages.0.blocks.0.norm2.weight",
        "backbone.stages.2.downsample.reduction.weight",
        "backbone.norm3.weight",
    ):
        assert name in theirs
    merging = "stages.0.downsample.reduction.weight"
    before = source.state_dict()[f"neck.backbone.{merging.replace('stages', 'layers')}"]
    assert not torch.equal(theirs[f"backbone.{merging}"], before)
    report = load_weights(target, theirs)
    assert (report.problems, report.unexpected) == ([], [])
    assert equal(target.state_dict(), source.state_dict())


def test_a_resnets_stages_are_not_merged():
    backbone = TorchvisionBackbone("resnet18", out_features=["res3", "res4", "res5"])
    names = {f"neck.backbone.{key}": value for key, value in backbone.state_dict().items()}
    assert equal(from_mmdetection(to_mmdetection(names)), names)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("positional_encoding=dict(normalize=True, num_feats=128, offset=0.0, temperature=20),", (20, 0)),
        (
            "    positional_encoding=dict(\n        num_feats=128,\n        offset=-0.5,\n        temperature=10000)",
            (10000, -0.5),
        ),
        ("positional_encoding=dict(num_feats=128, normalize=True)", (10000, 0)),
        ("model=dict()", None),
        ("positional_encoding=dict(temperature=__import__('os').getpid(), offset=1)", None),
        ("positional_encoding=dict(temperature=" + "9" * 400 + ", offset=0)", None),
        ({"model": {}}, None),
        (None, None),
    ],
)
def test_the_position_encoding_of_the_config(config, expected):
    assert position_of({"meta": {"cfg": config}}) == expected
    assert position_of({"meta": None}) is position_of({}) is None


def test_class_names():
    assert classes_of({"meta": {"dataset_meta": {"classes": ("cat", "dog")}}}) == ["cat", "dog"]
    assert classes_of({"meta": {"dataset_meta": {"CLASSES": ["cat"]}}}) == ["cat"]
    assert classes_of({"meta": {"CLASSES": ("cat",)}}) == ["cat"]
    for meta in ({}, None, {"dataset_meta": 7}, {"CLASSES": "cat"}, {"CLASSES": [1]}, {"CLASSES": []}):
        assert classes_of({"meta": meta}) is None


@pytest.mark.parametrize(
    "name", ["bbox_head.cls_branches.0.bias", "level_embed", "dn_query_generator.label_embedding.weight"]
)
def test_damaged_files(name):
    theirs = mmdetection_state(network_without_bias())
    with pytest.raises(DataError, match="damaged, or of an unknown variant"):
        convert({**theirs, name: torch.tensor(1.0)})


def test_shared_heads_become_separate_ones():
    model = shared_network()
    theirs = convert(model.state_dict(), to="mmdetection")
    assert torch.equal(theirs["bbox_head.cls_branches.0.weight"], theirs["bbox_head.cls_branches.1.weight"])
    assert equal(convert(theirs), model.state_dict())
