"""`dino convert CHECKPOINT FOLDER --to huggingface`, and back."""

import argparse
import ast
import json
import os
import re
import shlex

import pytest
import torch
from safetensors import safe_open

import dino
from dino import cli
from dino.utils.files import DataError, UserError
from dino.weights import convert, read_content, recognise, resnet_to_torchvision, weights_of
from dino.weights.coco_classes import coco_ids, coco_names
from dino.weights.conversion import convert_file
from dino.weights.network_parts import build_network
from dino.weights.transformers_folder import describe_fields
from dino.weights.transformers_writing import write_folder

from ..tiny import random_batch
from . import folders
from .folders import IDS, NAMES, PREPROCESSING, tiny_detector, write_own, write_tiny
from .states import detrex_state, equal, official_state, randomise

FILES = ["README.md", "config.json", "dino_detr.py", "model.safetensors", "preprocessor_config.json"]


def keys_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys()), file.metadata()


def assert_same(first, second):
    """Two checkpoints in own format have equal tensors, names, ids and preprocessing."""
    a, b = (read_content(path) for path in (first, second))
    assert equal(weights_of(a), weights_of(b))
    assert (a["names"], a["category_ids"]) == (b["names"], b["category_ids"])
    stated = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in c["about"]["preprocessing"].items()} for c in (a, b)
    ]
    assert stated[0] == stated[1]


VARIANT = "dino.modeling.variants.DistinctSelection"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shared_heads": False, "pe_temperature_H": 10000, "pe_temperature_W": 10000, "pe_offset": -0.5},
        {"use_pretrained_backbone": False, "position_embedding_type": "learned", "num_denoising": 0},
        {"backbone": "tf_mobilenetv3_small_075", "use_timm_backbone": True, "backbone_kwargs": {"out_indices": [1, 2]}},
        {"network": {"query_selection": VARIANT}},
    ],
)
def test_there_and_back(tmp_path, fields):
    if "network" in fields:
        node = describe_fields(folders.FIELDS)
        node["query_selection"]["_target_"] = fields["network"]["query_selection"]
        fields = {"network": node}
    write_own(tmp_path / "own.pth", **fields)
    convert_file(tmp_path / "own.pth", tmp_path / "sub/model", to="huggingface")
    assert sorted(os.listdir(tmp_path / "sub/model")) == FILES
    assert os.listdir(tmp_path / "sub") == ["model"]
    convert_file(tmp_path / "sub/model", tmp_path / "again.pth", to="own")
    assert_same(tmp_path / "own.pth", tmp_path / "again.pth")
    config = json.loads((tmp_path / "sub/model/config.json").read_text())
    assert (config["network"] is not None) == ("network" in fields)


def test_what_is_written(tmp_path):
    detector = write_tiny(tmp_path / "model")
    keys, metadata = keys_of(tmp_path / "model")
    own = set(detector.network.state_dict())
    second = {key for key in own if key.startswith(("decoder.class_heads.1.", "decoder.box_heads.1."))}
    assert len(second) == 8
    assert keys == {f"model.network.{key}" for key in own - second}  # a shared tensor under its first name
    assert metadata == {"format": "pt"}
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "weights that only their owner can read"
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == ["DinoDetrForObjectDetection"]
    assert (config["model_type"], config["dtype"], config["category_ids"]) == ("dino_detr", "float32", IDS)
    assert config["id2label"] == dict(zip("012", NAMES, strict=True))
    assert "backbone_checkpoint" not in config
    processor = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 64, "longest_edge": 96}
    assert processor["image_mean"] == [x / 255 for x in PREPROCESSING.pixel_mean[:2]] + [0.406]
    assert (processor["max_detections"], processor["category_ids"]) == (20, IDS)
    assert processor["image_processor_type"] == "DinoDetrImageProcessor"
    card = (tmp_path / "model/README.md").read_text()
    assert "license: unknown" in card
    assert "import dino.hf" in card
    assert "A detector of 3 classes" in card
    assert "red, green, blue" in card


def official_file(path, classes=3):
    torch.manual_seed(0)
    node = describe_fields(folders.FIELDS | {"backbone_kwargs": None, "num_labels": classes, "num_feature_levels": 4})
    network = randomise(build_network({"network": node})).eval()
    args = argparse.Namespace(pe_temperatureH=20, pe_temperatureW=20, nheads=4, num_select=50)
    torch.save({"model": official_state(network), "args": args}, path)
    return network


@torch.no_grad()
def test_the_official_programs_file(tmp_path, capsys):
    network = official_file(tmp_path / "checkpoint.pth")
    convert_file(tmp_path / "checkpoint.pth", tmp_path / "model", to="huggingface")
    output = capsys.readouterr().out
    assert "model: folder for transformers, 3 classes" in output
    assert "was in official format" in output
    detector = dino.load(tmp_path / "model")
    assert detector.preprocessing.max_detections == 50
    batch = random_batch(2)
    assert torch.equal(detector.network(*batch).decoder.boxes, network(*batch).decoder.boxes)
    convert_file(tmp_path / "model", tmp_path / "official.pth", to="official")
    state = weights_of(read_content(tmp_path / "official.pth"))
    assert recognise(state) == "official"
    expected = official_state(network)
    labels = "transformer.label_enc.weight" if "transformer.label_enc.weight" in expected else "label_enc.weight"
    assert torch.equal(state.pop(labels)[:3], expected.pop(labels)[:3])  # rows of no class are not kept
    assert equal(state, expected)


def test_a_file_of_detrex(tmp_path):
    node = describe_fields(folders.FIELDS | {"backbone_kwargs": None, "num_feature_levels": 4, "shared_heads": False})
    torch.save({"model": detrex_state(randomise(build_network({"network": node})))}, tmp_path / "detrex.pth")
    with pytest.raises(DataError, match=r"can't convert .*detrex\.pth: it is detrex', .* give --temperature and --off"):
        convert_file(tmp_path / "detrex.pth", tmp_path / "model", to="huggingface")
    assert os.listdir(tmp_path) == ["detrex.pth"]
    constants = {"temperature": 10000.0, "offset": -0.5}
    convert_file(tmp_path / "detrex.pth", tmp_path / "model", to="huggingface", **constants)
    detector = dino.load(tmp_path / "model")
    position = detector.network.position_encoding
    assert (position.temperatures, position.offset) == ((10000.0, 10000.0), -0.5)
    assert detector.names == ["class 0", "class 1", "class 2"]
    convert_file(tmp_path / "model", tmp_path / "again.pth", to="detrex")
    states = [convert(weights_of(read_content(tmp_path / name))) for name in ("detrex.pth", "again.pth")]
    assert equal(*map(resnet_to_torchvision, states))


def test_a_bare_state_dict_is_not_enough(tmp_path):
    torch.save(tiny_detector().network.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(DataError, match=r"bare\.pth does not describe its model: it is a bare state dict"):
        convert_file(tmp_path / "bare.pth", tmp_path / "model", to="huggingface")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("form", [pytest.param("official", marks=pytest.mark.slow), "own"])
def test_cocos_80_classes(tmp_path, form):
    official_file(tmp_path / "official.pth", classes=91)
    source = tmp_path / "official.pth"
    if form == "own":
        source = tmp_path / "own.pth"
        convert_file(tmp_path / "official.pth", source, to="own")
    convert_file(source, tmp_path / "model", to="huggingface", coco80=True)
    detector = dino.load(tmp_path / "model")
    assert (detector.names, detector.category_ids) == (coco_names(80), coco_ids(80))
    weight = weights_of(read_content(source))[
        "class_embed.0.weight" if form == "official" else "decoder.class_heads.0.weight"
    ]
    assert torch.equal(detector.network.decoder.class_heads[0].weight, weight[coco_ids(80)])
    if form == "official":
        convert_file(source, tmp_path / "raw", to="huggingface")
        assert len(dino.load(tmp_path / "raw").names) == 91


def test_copies_of_the_weights(tmp_path):
    detector = write_own(tmp_path / "own.pth")
    content = torch.load(tmp_path / "own.pth")
    raw = {key: x + 1 if x.is_floating_point() else x for key, x in content["model"].items()}
    torch.save(content | {"model": raw, "ema": {"model": content["model"], "updates": 3}}, tmp_path / "both.pth")
    for copy, expected in (("auto", content["model"]), ("model", raw)):
        convert_file(tmp_path / "both.pth", tmp_path / copy, to="huggingface", copy=copy)
        assert equal(dino.load(tmp_path / copy).network.state_dict(), expected)
    assert detector.names == dino.load(tmp_path / "auto").names


def test_nothing_is_replaced(tmp_path):
    write_own(tmp_path / "own.pth")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="model exists: choose another name"):
        convert_file(tmp_path / "own.pth", tmp_path / "model", to="huggingface")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link exists: choose another name"):
        convert_file(tmp_path / "own.pth", tmp_path / "link", to="huggingface")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="can't make the folder"):
        convert_file(tmp_path / "own.pth", tmp_path / "file/model", to="huggingface")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "model", "own.pth"]


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dino.weights.transformers_writing.save_file", full)
    detector = tiny_detector()
    with pytest.raises(UserError, match="No space left on device"):
        write_folder(tmp_path / "model", detector, {"network": describe_fields(folders.FIELDS)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [pytest.param("out.pth", marks=pytest.mark.slow), "out.safetensors"])
def test_a_file_keeps_the_key_form_of_the_proposal(tmp_path, name):
    official_file(tmp_path / "official.pth")
    convert_file(tmp_path / "official.pth", tmp_path / name, to="huggingface")
    assert recognise(weights_of(read_content(tmp_path / name))) == "huggingface"


def test_the_card_quotes_the_name_of_the_folder(tmp_path):
    name = 'my "best" $model'
    write_tiny(tmp_path / name)
    card = (tmp_path / name / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    (line,) = [line for line in code.splitlines() if line.startswith("folder = ")]
    assert ast.literal_eval(line.removeprefix("folder = ").partition("  #")[0]) == name
    (command,) = re.findall("`(dino predict .*?)`", card)
    assert shlex.split(command) == ["dino", "predict", name, "PICTURE"]


MATCHER = {"_target_": "dino.layers.HungarianMatcher", "class_cost": 1.5}
CRITERION = {"_target_": "dino.layers.SetCriterion", "matcher": MATCHER, "class_weight": 3.0}


@pytest.mark.parametrize(
    ("criterion", "kept"),
    [
        (None, True),
        (CRITERION, True),
        ({**CRITERION, "alpha": 0.5, "matcher": {**MATCHER, "alpha": 0.5, "gamma": 2}}, True),
        ({**CRITERION, "alpha": 0.5, "matcher": {**MATCHER, "alpha": 0.25}}, False),
        ({**CRITERION, "class_loss": {"_target_": "dino.layers.SquaredIoULoss"}}, False),
        ({**CRITERION, "matcher": {"_target_": "dino.modeling.variants.PositionModulatedMatcher"}}, False),
        ({"_target_": "dino.layers.LossScaling", "criterion": CRITERION, "factors": {}}, False),
        ("text", False),
    ],
)
def test_losses_that_a_folder_can_not_express_are_named(tmp_path, capsys, criterion, kept):
    write_own(tmp_path / "own.pth")
    content = torch.load(tmp_path / "own.pth")
    config = json.loads(content["about"]["config"]) | ({"criterion": criterion} if criterion else {})
    content["about"]["config"] = json.dumps(config)
    torch.save(content, tmp_path / "own.pth")
    convert_file(tmp_path / "own.pth", tmp_path / "model", to="huggingface")
    assert ("dropped: the losses of its recipe" in capsys.readouterr().out) == (not kept)


def test_the_command(tmp_path, capsys):
    write_own(tmp_path / "own.pth")
    assert not cli.main(["convert", str(tmp_path / "own.pth"), str(tmp_path / "my.model"), "--to", "huggingface"])
    assert not cli.main(["convert", str(tmp_path / "my.model"), str(tmp_path / "again.pth"), "--to", "own"])
    assert_same(tmp_path / "own.pth", tmp_path / "again.pth")
    assert f"{tmp_path / 'my.model'}: folder for transformers, 3 classes; " in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path / "own.pth"), str(tmp_path / "my.model"), "--to", "huggingface"]) == 1
    assert "my.model exists" in capsys.readouterr().err
