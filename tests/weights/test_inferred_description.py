"""Models of other programs' files, which do not describe them."""

import argparse
import json

import pytest
import torch

from dino.modeling import TorchvisionBackbone, build_dino, share_heads
from dino.modeling.variants import DropoutEncoder, LearnedSizeSelection, SharedHeadsDropoutDecoder
from dino.utils.files import DataError
from dino.weights import file_facts
from dino.weights.checkpoint_formats import COCO_IDS
from dino.weights.description import detector_from_checkpoint
from dino.weights.inferred_description import (
    BACKBONES,
    Unshown,
    _describe_resnet,
    _describe_swin,
    _read_maps,
    describe_network,
)

from ..tiny import random_batch
from .states import detrex_state, official_state, randomise

SIZES = {"embed_dim": 32, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}


def network(**changes):
    return randomise(build_dino(backbone=TorchvisionBackbone("resnet18"), **{"num_classes": 91, **SIZES, **changes}))


def official_file(path, model, **args):
    share_heads(model.decoder)
    torch.save({"model": official_state(model), "epoch": 11, "args": argparse.Namespace(**args)}, path)
    return path


def detrex_file(path, model):
    torch.save({"model": detrex_state(model)}, path)
    return path


@torch.no_grad()
def test_an_official_file_is_a_detector(tmp_path):
    model = network().eval()
    found = detector_from_checkpoint(official_file(tmp_path / "checkpoint0011_4scale.pth", model))
    assert found.category_ids == list(range(91))
    assert [found.names[label] for label in (1, 3, 90)] == ["person", "car", "toothbrush"]
    batch = random_batch(2)
    assert torch.equal(found.network(*batch).decoder.boxes, model(*batch).decoder.boxes)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "selu"])
def test_activations_of_the_official_program(tmp_path, activation):
    """Of encoder and decoder, from the arguments alone; dropout is over when a file is evaluated."""
    model = network().eval()
    for part, kind in (("encoder", DropoutEncoder), ("decoder", SharedHeadsDropoutDecoder)):
        old, options = getattr(model, part), {"embed_dim": 32, "hidden_dim": 16, "activation": activation}
        options |= {"num_classes": 91, "num_layers": 2} if part == "decoder" else {"num_layers": 1}
        new = kind(**options)
        new.load_state_dict(old.state_dict())
        setattr(model, part, new.eval())
    args = {"transformer_activation": activation, "dropout": 0.1}
    found = detector_from_checkpoint(official_file(tmp_path / "a.pth", model, **args)).eval()
    batch = random_batch(2)
    assert torch.equal(found.network(*batch).decoder.boxes, model(*batch).decoder.boxes)
    again = json.loads(json.dumps(describe_network(model.state_dict(), {}, Unshown(activation=activation))))
    assert again["encoder"]["_target_"] == "dino.modeling.variants.DropoutEncoder"


@torch.no_grad()
def test_learned_sizes_of_anchors_of_the_official_program(tmp_path):
    model = network().eval()
    selection = LearnedSizeSelection(num_queries=12, num_classes=91, embed_dim=32)
    selection.load_state_dict(model.query_selection.state_dict(), strict=False)
    selection.size.weight.copy_(torch.tensor([[-1.5, -2.0]]))
    model.query_selection = selection
    path = official_file(tmp_path / "a.pth", model, two_stage_learn_wh=True)
    assert "transformer.two_stage_wh_embedding.weight" in torch.load(path, weights_only=False)["model"]
    found = detector_from_checkpoint(path).eval()
    batch = random_batch(2)
    assert torch.equal(found.network(*batch).decoder.boxes, model(*batch).decoder.boxes)


@torch.no_grad()
def test_arguments_of_the_official_program_count(tmp_path):
    model = network(num_heads=4, num_classes=80)
    args = {"pe_temperatureH": 50, "pe_temperatureW": 60.0, "nheads": 4, "num_select": 7, "two_stage_type": "standard"}
    found = detector_from_checkpoint(official_file(tmp_path / "a.pth", model, **args))
    assert found.network.position_encoding.temperatures == (50.0, 60.0)
    assert found.network.encoder.layers[0].attention.num_heads == 4
    assert found.preprocessing.max_detections == 7
    assert (found.names[79], found.category_ids) == ("toothbrush", list(COCO_IDS))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"two_stage_type": "no"}, "its network is not DINO's: two_stage_type is 'no', not 'standard'"),
        ({"pre_norm": True}, "pre_norm is True, not False"),
        ({"decoder_module_seq": ["ca", "sa", "ffn"]}, "decoder_module_seq is"),
        ({"pe_temperatureH": "20"}, "args.pe_temperatureH is '20', a number such as 20.0 was expected"),
        ({"pe_temperatureW": float("nan")}, "args.pe_temperatureW is nan"),
        ({"nheads": 8.0}, "args.nheads is 8.0"),
        ({"nheads": 5}, "has no 5 heads"),
        ({"num_select": 0}, "args.num_select is 0"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, args, message):
    path = official_file(tmp_path / "a.pth", network(), **args)
    with pytest.raises(DataError, match=f"a.pth.*{message}"):
        detector_from_checkpoint(path)


def test_detrex_files_need_their_constants(tmp_path, monkeypatch):
    path = detrex_file(tmp_path / "mine.pth", network(num_classes=5))
    with pytest.raises(DataError, match=r"mine.pth: it is detrex'.*--temperature and --offset.*10000 -0.5 for most"):
        detector_from_checkpoint(path)
    published = argparse.Namespace(format="detrex", temperature=10000.0, offset=-0.5)
    monkeypatch.setattr(file_facts, "find_source", lambda source: published if "mine" in source else None)
    found = detector_from_checkpoint(path)
    assert (found.network.position_encoding.temperatures, found.network.position_encoding.offset) == ((1e4, 1e4), -0.5)
    assert found.names == [f"class {label}" for label in range(5)]


@torch.no_grad()
def test_a_swin_is_described():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import SwinTransformer

    from dino.weights.description import build_network

    swin = SwinTransformer(
        embed_dim=24, depths=[1, 2, 3, 1], num_heads=[1, 2, 3, 4], window_size=5, out_indices=[1, 2, 3], mlp_ratio=4
    )
    model = randomise(build_dino(backbone=swin, in_features=["p1", "p2", "p3"], num_classes=80, **SIZES)).eval()
    own = model.state_dict()
    described = build_network({"network": describe_network(own, _describe_swin(own), Unshown())}).eval()
    described.load_state_dict(model.state_dict())
    batch = random_batch(2)
    assert torch.equal(described(*batch).decoder.boxes, model(*batch).decoder.boxes)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101"])
def test_a_resnet_is_known_by_its_blocks(name):
    model = build_dino(backbone=TorchvisionBackbone(name), num_classes=3, **SIZES)
    assert _describe_resnet(model.state_dict())["name"] == name


def test_backbones_of_published_weights_are_those_of_their_recipes():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import LazyConfig

    from dino.d2.recipe_description import describe
    from dino.utils.recipes import find_recipe
    from dino.weights.published import PUBLISHED

    used = set()
    for recipe in {entry.recipe for entry in PUBLISHED.values()}:
        start = next((start for start in BACKBONES if recipe.startswith(start)), None)
        neck = json.loads(describe(LazyConfig.load(str(find_recipe(recipe))))["config"])["network"]["neck"]
        own = {f"neck.lateral.{i}.0.weight": None for i in range(len(neck["in_features"]))}
        if start is None:
            assert "ResNet" in neck["backbone"]["_target_"] or "Swin" in neck["backbone"]["_target_"]
            continue
        expected = {k: v for k, v in neck["backbone"].items() if k != "drop_path_rate"}  # of training only
        if expected.get("options") == {"drop_path_rate": 0.3}:
            del expected["options"]
        assert _read_maps(BACKBONES[start], own) == {"backbone": expected, "in_features": neck["in_features"]}
        used.add(start)
    assert used == {*BACKBONES}
