import argparse
import json

import pytest
import torch
from torch import nn

from dino.modeling import TorchvisionBackbone, build_dino, share_heads
from dino.utils.files import DataError, UserError
from dino.weights import load_weights, read_content, recognise, weights_of
from dino.weights.checkpoint_formats import COCO_IDS
from dino.weights.conversion import convert_file
from dino.weights.description import detector_from_checkpoint, model_from_checkpoint

from ..tiny import random_batch, tiny_network
from ..weights.states import detrex_state, equal, official_state, randomise
from ..weights.test_checkpoint_formats import shared_network
from .programs import assert_one_error, run_here


def convert(source, target, to, **options):
    convert_file(source, target, to=to, **options)
    return weights_of(read_content(target))


def official_file(path, model):
    torch.save({"model": official_state(model), "epoch": 11, "args": argparse.Namespace(num_classes=91)}, path)
    return path


def test_all_ways_round(tmp_path):
    model = shared_network()
    first = official_file(tmp_path / "official.pth", model)
    convert(first, tmp_path / "own.pth", "own")
    convert(tmp_path / "own.pth", tmp_path / "hf.safetensors", "huggingface")
    convert(tmp_path / "hf.safetensors", tmp_path / "own.safetensors", "safetensors")
    last = convert(tmp_path / "own.safetensors", tmp_path / "again.pth", "official")
    assert recognise(weights_of(read_content(tmp_path / "hf.safetensors"))) == "huggingface"
    assert equal(last, official_state(model))
    assert not list(tmp_path.glob("*.part"))


def test_detrex_and_back(tmp_path, capsys):
    model = randomise(tiny_network())
    torch.save({"model": detrex_state(model)}, tmp_path / "detrex.pth")
    convert(tmp_path / "detrex.pth", tmp_path / "own.pth", "own")
    output = capsys.readouterr().out
    assert "warning: no description" in output
    assert "give --temperature and --offset" in output
    assert equal(convert(tmp_path / "own.pth", tmp_path / "again.pth", "detrex"), detrex_state(model))


def test_half_of_the_constants_is_refused(tmp_path):
    torch.save({"model": detrex_state(randomise(tiny_network()))}, tmp_path / "detrex.pth")
    with pytest.raises(UserError, match="--temperature and --offset belong together for a file of detrex: give both"):
        convert(tmp_path / "detrex.pth", tmp_path / "own.pth", "own", temperature=10000.0)
    assert not (tmp_path / "own.pth").exists()


def test_what_is_lost_is_said(tmp_path, capsys):
    source = official_file(tmp_path / "official.pth", shared_network(num_classes=91))
    few = convert(source, tmp_path / "few.pth", "detrex", coco80=True)
    assert len(few["class_embed.0.bias"]) == len(few["label_enc.weight"]) == 80
    assert "dropped: the rows of the 11 ids that COCO does not use" in capsys.readouterr().out
    convert(source, tmp_path / "all.pth", "detrex")
    assert "dropped: the label embeddings that belong to no class" in capsys.readouterr().out
    torch.save({"model": shared_network(branches={"pass": nn.Linear(2, 3)}).state_dict()}, tmp_path / "branch.pth")
    assert "branches.pass.weight" in convert(tmp_path / "branch.pth", tmp_path / "own.pth", "own")
    assert "dropped" not in capsys.readouterr().out
    convert(tmp_path / "branch.pth", tmp_path / "other.pth", "official")
    assert "dropped: the branches, which only training uses; the official format" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("described", "lost"),
    [
        ({"encoder": {"activation": "gelu"}, "decoder": {"activation": "gelu"}}, ["the activation gelu"]),
        ({"backbone": {"name": "resnet50", "dilated": ["res5"]}}, ["the dilated stage of the ResNet"]),
        ({"stages": {"_target_": "dino.d2.detectron2_backbones.dilated_stages"}}, ["the dilated stage of the ResNet"]),
        ({"encoder": {"activation": "relu"}, "backbone": {"dilated": []}}, []),
    ],
)
def test_settings_that_no_tensor_shows_are_named(tmp_path, capsys, described, lost):
    content = {"model": shared_network().state_dict(), "about": {"config": json.dumps({"network": described})}}
    torch.save(content, tmp_path / "own.pth")
    convert(tmp_path / "own.pth", tmp_path / "official.pth", "official")
    said = [
        f"dropped: {name}; the official format has no place for it, so set it in the other program" for name in lost
    ]
    assert [line for line in capsys.readouterr().out.splitlines() if "dropped" in line] == said
    convert(tmp_path / "own.pth", tmp_path / "again.pth", "own")
    assert "dropped" not in capsys.readouterr().out


@torch.no_grad()
def test_the_official_checkpoint_predicts_by_itself(tmp_path):
    sizes = {"embed_dim": 32, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
    model = build_dino(backbone=TorchvisionBackbone("resnet50"), num_classes=91, **sizes)
    share_heads(randomise(model).decoder)
    for unused in set(range(91)) - set(COCO_IDS):  # as in a trained model, where these rows never choose a query
        model.query_selection.class_head.weight[unused], model.query_selection.class_head.bias[unused] = 0, -9
    convert(official_file(tmp_path / "official.pth", model), tmp_path / "own.safetensors", "safetensors", coco80=True)
    found = model_from_checkpoint(tmp_path / "own.safetensors")
    assert (len(found.names), found.names[0], found.names[11], found.names[79]) == (
        80,
        "person",
        "stop sign",
        "toothbrush",
    )
    assert detector_from_checkpoint(tmp_path / "own.safetensors").category_ids == list(COCO_IDS)
    batch = random_batch(2)
    expected, actual = model.eval()(*batch).decoder, found.network(*batch).decoder
    torch.testing.assert_close(actual.boxes, expected.boxes)
    torch.testing.assert_close(actual.logits[..., 11], expected.logits[..., 13])


@torch.no_grad()
def test_detrex_constants_of_the_position_encoding(tmp_path):
    sizes = {"embed_dim": 32, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 12}
    names = ["res2", "res3", "res4", "res5"]
    backbone = TorchvisionBackbone("resnet101", out_features=names)
    model = build_dino(backbone=backbone, in_features=names, num_levels=5, num_classes=80, **sizes)
    torch.save({"model": detrex_state(model)}, tmp_path / "detrex.pth")
    convert(tmp_path / "detrex.pth", tmp_path / "own.pth", "own", temperature=10000.0, offset=-0.5)
    network = model_from_checkpoint(tmp_path / "own.pth").network
    assert (network.position_encoding.temperatures, network.position_encoding.offset) == ((10000.0, 10000.0), -0.5)
    assert len(network.neck.lateral) == 4


def test_running_averages(tmp_path):
    raw, average = shared_network(), shared_network()
    torch.save({"model": official_state(raw), "ema_model": official_state(average)}, tmp_path / "in.pth")
    for copy, model in (("auto", average), ("ema", average), ("model", raw)):
        convert(tmp_path / "in.pth", tmp_path / f"{copy}.pth", "own", copy=copy)
        target = tiny_network()
        load_weights(target, tmp_path / f"{copy}.pth")
        assert torch.equal(target.level_embed, model.level_embed)


def test_own_names_and_descriptions_stay(tmp_path):
    content = {"model": tiny_network().state_dict(), "names": ["a", "b", "c"], "about": {"config": "{}"}}
    torch.save(content, tmp_path / "own.pth")
    convert(tmp_path / "own.pth", tmp_path / "own.safetensors", "safetensors")
    read = read_content(tmp_path / "own.safetensors")
    assert (read["names"], read["about"]) == (content["names"], content["about"])


def test_faults_are_named(tmp_path):
    torch.save({"model": randomise(tiny_network()).state_dict()}, tmp_path / "own.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "there.pth").write_bytes(b"precious")
    for words, message in (
        (("own.pth", "there.pth", "own", {}), "there.pth exists: choose another name"),
        (("own.pth", "new.pth", "official", {}), "own.pth: the official program has one pair of heads"),
        (("own.pth", "new.pth", "own", {"coco80": True}), "this one has 3 classes"),
        (("own.pth", "new.pth", "own", {"copy": "ema"}), "no running average"),
        (("other.pth", "new.pth", "own", {}), "other.pth: this is no DINO in a known format"),
        (("absent.pth", "new.pth", "own", {}), "weights not found"),
    ):
        source, target, to, options = words
        with pytest.raises(UserError, match=message) as caught:
            convert(tmp_path / source, tmp_path / target, to, **options)
        assert isinstance(caught.value, DataError) == ("exists" not in message)
    assert (tmp_path / "there.pth").read_bytes() == b"precious"
    assert not (tmp_path / "new.pth").exists()


def test_the_program():
    result = run_here("convert_weights", "--help")
    assert result.returncode == 0
    assert "checkpoint0011_4scale.pth dino_r50_4scale.pth --to own --coco80" in result.stdout
    assert_one_error(run_here("convert_weights", "a.pth", "b.pth", "--to", "own"), "weights not found", code=2)
