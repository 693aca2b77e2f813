import copy

import pytest
import torch

from dino.modeling import TorchvisionBackbone, build_dino, share_heads
from dino.modeling.transformer import _FOCAL_PRIOR
from dino.modeling.variants import HybridBranch
from dino.utils.files import DataError
from dino.weights import load_weights, resnet_to_detectron2

from ..tiny import TinyBackbone, random_batch, tiny_network
from .states import detrex_state, equal, official_state, randomise
from .test_checkpoint_formats import resnet_network, shared_network

CLASS_TENSORS = 2 * 2 + 2 + 1  # weight and bias of the heads of two decoder layers and of the encoder; label embedding


def test_everything_fits():
    source, target = randomise(tiny_network()), tiny_network()
    report = load_weights(target, source.state_dict())
    assert equal(source.state_dict(), target.state_dict())
    assert (report.problems, report.unexpected) == ([], [])
    assert set(report.loaded) == set(target.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("write", [official_state, detrex_state])
def test_outputs_survive_the_conversion(write):
    source, target = shared_network().eval(), tiny_network().eval()
    report = load_weights(target, write(source))
    assert not report.problems + report.unexpected
    batch = random_batch(2)
    torch.testing.assert_close(target(*batch).decoder.boxes, source(*batch).decoder.boxes)
    torch.testing.assert_close(target(*batch).decoder.logits, source(*batch).decoder.logits)


def test_the_published_official_file_fits_the_published_model():
    """As the recipes have it: 80 classes and separate heads, from 91 classes and shared heads."""
    source, target = resnet_network(num_classes=91), resnet_network(num_classes=80)
    share_heads(randomise(source).decoder)
    report = load_weights(target, official_state(source))
    assert (report.format, report.problems, report.unexpected) == ("official", [], [])
    assert "91 raw category ids of COCO became its 80 classes" in str(report)
    heads = target.decoder.class_heads
    assert torch.equal(heads[5].weight[11], source.decoder.class_heads[0].weight[13])
    assert torch.equal(target.denoising.label_embed.weight[79], source.denoising.label_embed.weight[90])


def test_names_of_detectron2s_resnet_load_too():
    source, target = randomise(resnet_network(num_classes=3)), resnet_network(num_classes=3)
    assert not load_weights(target, resnet_to_detectron2(source.state_dict())).problems
    assert equal(source.state_dict(), target.state_dict())


def test_another_number_of_classes():
    source, target = randomise(tiny_network(num_classes=5)), tiny_network(num_classes=3)
    before = copy.deepcopy(target.state_dict())
    report = load_weights(target, source.state_dict())
    assert set(report.reinitialised.values()) == {"3 classes instead of 5"}
    assert len(report.reinitialised) == CLASS_TENSORS
    for name, value in target.state_dict().items():
        assert torch.equal(value, (before if name in report.reinitialised else source.state_dict())[name]), name
    assert torch.equal(target.decoder.class_heads[1].bias, torch.full((3,), _FOCAL_PRIOR))
    assert "re-initialised, 3 classes instead of 5: " in str(report)


@torch.no_grad()
def test_the_same_classes_in_another_order():
    source, target = randomise(tiny_network()).eval(), tiny_network().eval()
    content = {"model": source.state_dict(), "names": ["cat", "dog", "cow"]}
    report = load_weights(target, content, classes=["cow", "cat", "dog"])
    assert "the same classes in another order" in str(report)
    batch = random_batch(2)
    torch.testing.assert_close(target(*batch).decoder.logits, source(*batch).decoder.logits[..., [2, 0, 1]])
    assert torch.equal(target.denoising.label_embed.weight, source.denoising.label_embed.weight[[2, 0, 1]])


@pytest.mark.parametrize(
    "names", [["cat", "dog", "hen"], ["cat", "cat", "cow"], ["cat", "dog"], [1, {}, None], "cat", 7]
)
def test_other_names_leave_the_classes_where_they_are(names):
    source, target = randomise(tiny_network()), tiny_network()
    load_weights(target, {"model": source.state_dict(), "names": names}, classes=["cow", "cat", "dog"])
    assert equal(source.state_dict(), target.state_dict())


def hybrid(num_queries=20, num_classes=3):
    return {"many": HybridBranch(num_queries=num_queries, num_classes=num_classes, embed_dim=32)}


def test_branches_of_other_sizes():
    """Their class heads and contents keep the initial values, as those of the main selection do."""
    source = randomise(tiny_network(num_classes=5, branches=hybrid(num_classes=5)))
    target = tiny_network(branches=hybrid(num_queries=30))
    report = load_weights(target, source.state_dict())
    assert report.reinitialised["branches.many.content.weight"] == "30 queries instead of 20"
    assert report.reinitialised["branches.many.class_head.weight"] == "3 classes instead of 5"
    assert len(report.reinitialised) == CLASS_TENSORS + 3
    assert equal(target.branches["many"].box_head.state_dict(), source.branches["many"].box_head.state_dict())
    assert "\n  branches " in str(report)


def test_branches_of_the_model_or_the_file_alone():
    """They start anew in training, or are left out: the report says so."""
    source = randomise(tiny_network(branches=hybrid()))
    names = [name for name in source.state_dict() if name.startswith("branches.")]
    assert load_weights(tiny_network(), source.state_dict()).unexpected == names
    report = load_weights(source, tiny_network().state_dict())
    assert report.problems == report.missing == names


def test_another_number_of_queries():
    source, target = randomise(tiny_network(num_queries=12)), tiny_network(num_queries=20)
    report = load_weights(target, source.state_dict())
    assert report.reinitialised == {"query_selection.content.weight": "20 queries instead of 12"}
    assert len(report.loaded) == len(target.state_dict()) - 1


def resnet18(names, num_levels):
    backbone = TorchvisionBackbone("resnet18", out_features=names)
    sizes = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    return build_dino(backbone=backbone, in_features=names, num_levels=num_levels, num_classes=3, **sizes)


def level_tensors(model, name):
    return {stride: value for stride, value in zip((4, 8, 16, 32, 64)[-len(name) :], name, strict=True)}


def test_levels_are_matched_by_stride():
    four, five = resnet18(["res3", "res4", "res5"], 4), resnet18(["res2", "res3", "res4", "res5"], 5)
    fresh = copy.deepcopy(five.state_dict())
    report = load_weights(five, randomise(four).state_dict())
    assert torch.equal(five.level_embed[1:], four.level_embed)
    assert torch.equal(five.level_embed[0], fresh["level_embed"][0])
    for level in range(3):
        assert torch.equal(five.neck.lateral[level + 1][0].weight, four.neck.lateral[level][0].weight)
    assert torch.equal(five.neck.extra_levels[0][0].weight, four.neck.extra_levels[0][0].weight)
    attention = {"5 levels instead of 4": 8}  # offsets and weights, weight and bias, encoder and decoder layer
    reasons = list(report.reinitialised.values())
    assert {r: reasons.count(r) for r in set(reasons)} == attention | {"the rows of stride 4 only": 1}
    assert report.missing == [f"neck.lateral.0.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")]
    assert report.unexpected == []


def test_fewer_levels_take_the_rows_of_their_strides():
    four, five = resnet18(["res3", "res4", "res5"], 4), resnet18(["res2", "res3", "res4", "res5"], 5)
    report = load_weights(four, randomise(five).state_dict())
    assert torch.equal(four.level_embed, five.level_embed[1:])
    assert torch.equal(four.neck.lateral[0][0].weight, five.neck.lateral[1][0].weight)
    assert report.missing == []
    assert set(report.reinitialised.values()) == {"4 levels instead of 5"}
    assert len(report.unexpected) == 4
    assert report.unexpected[0] == "neck.lateral.stride4.0.weight"


def test_more_and_fewer_decoder_layers():
    source, target = randomise(tiny_network(num_layers=3)), tiny_network(num_layers=2)
    assert len(load_weights(target, source.state_dict()).unexpected) == 22 + 8
    report = load_weights(source, target.state_dict())
    assert len(report.missing) == 22 + 8
    assert report.problems == report.missing


def test_running_averages_are_taken_where_there_are_any(tmp_path):
    raw, average, target = randomise(tiny_network()), randomise(tiny_network()), tiny_network()
    path = tmp_path / "model.pth"
    torch.save({"model": raw.state_dict(), "ema_state": detrex_state(average)}, path)
    report = load_weights(target, path)
    assert "running average" in str(report)
    assert equal(target.state_dict(), average.state_dict())
    load_weights(target, path, copy="model")
    assert equal(target.state_dict(), raw.state_dict())
    with pytest.raises(DataError, match="no running average"):
        load_weights(target, raw.state_dict(), copy="ema")


def test_separate_heads_do_not_go_into_shared_ones():
    target = shared_network()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(DataError, match=r"share their heads, but the file has separate heads.*without share_heads"):
        load_weights(target, randomise(tiny_network()).state_dict())
    assert equal(before, target.state_dict())


@pytest.mark.parametrize(
    "name", ["encoder.layers.0.norm.weight", "neck.backbone.res4.weight", "decoder.class_heads.1.bias"]
)
def test_one_wrong_shape_is_named(name):
    source, target = tiny_network().state_dict(), tiny_network()
    source[name] = torch.zeros(7)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(DataError, match=rf"of another model: {name} is \(7,\) in the file and "):
        load_weights(target, source)
    assert equal(before, target.state_dict())


def test_files_of_other_models_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({f"layer.{i}.weight": torch.zeros(3) for i in range(9)}, path)
    with pytest.raises(
        DataError, match=r"can't use the weights .*other\.pth: the file is no DINO in a known format, and has only 0 "
    ):
        load_weights(tiny_network(), path)


def test_another_backbone_is_refused_unless_allowed():
    source, target = resnet18(["res3", "res4", "res5"], 4), tiny_network()
    state = {k: v for k, v in randomise(tiny_network()).state_dict().items() if not k.startswith("neck.backbone")}
    state |= {k: v for k, v in source.state_dict().items() if k.startswith("neck.backbone")}
    with pytest.raises(DataError, match=r"a DINO in own format, and has only 0 of the 6 tensors of the model's"):
        load_weights(target, state)
    report = load_weights(target, state, min_backbone=0)
    assert len(report.missing) == 6
    assert torch.equal(target.level_embed, state["level_embed"])


def test_a_backbones_own_file():
    source, target = TorchvisionBackbone("resnet18"), resnet18(["res3", "res4", "res5"], 4)
    randomise(source)
    file = {k.removeprefix("body."): v for k, v in source.state_dict().items()} | {"fc.weight": torch.zeros(1000, 512)}
    report = load_weights(target, file)
    assert report.format == "backbone"
    assert (report.problems, report.unexpected) == ([], ["neck.backbone.body.fc.weight"])
    assert equal(target.neck.backbone.state_dict(), source.state_dict())


def test_a_model_without_dino_is_refused():
    with pytest.raises(TypeError, match="TinyBackbone holds no DINO"):
        load_weights(TinyBackbone(), {})


def test_the_table():
    report = load_weights(tiny_network(num_classes=2), tiny_network().state_dict() | {"extra": torch.zeros(1)})
    lines = str(report).splitlines()
    assert lines[0] == "the state dict (format: own)"
    assert lines[1].split() == ["loaded", "re-initialised", "missing", "unexpected"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["denoising"] == ["0", "1", "0", "0"]
    assert rows["other"] == ["0", "0", "0", "1"]
    assert rows["all"][1:] == [str(CLASS_TENSORS), "0", "1"]
    assert lines[-1] == "  unexpected: extra"
