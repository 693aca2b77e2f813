"""`dino convert CHECKPOINT FOLDER --to huggingface`, and back."""

import argparse
import json
import os

import pytest
import torch
from safetensors import safe_open

import dino
from dino import cli
from dino.layers import Detections
from dino.modeling import build_dino, share_heads
from dino.modeling.detector import Preprocessing
from dino.utils.files import DataError, UserError
from dino.weights import read_content, recognise, weights_of
from dino.weights.coco_classes import coco_ids, coco_names
from dino.weights.conversion import convert_file
from dino.weights.transformers_folder import describe_fields

from ..tiny import random_batch
from . import folders
from .folders import IDS, NAMES, PREPROCESSING, tiny_detector, write_own, write_tiny
from .states import detrex_state, equal, official_state, randomise

FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


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
    from dino.weights.network_parts import build_network

    network = randomise(build_network({"network": node})).eval()
    args = argparse.Namespace(pe_temperatureH=20, pe_temperatureW=20, nheads=4, num_select=50)
    torch.save({"model": official_state(network), "args": args}, path)
    return network


@torch.no_grad()
def test_the_official_programs_file(tmp_path, capsys):
    network = official_file(tmp_path / "checkpoint.pth")
    convert_file(tmp_path / "checkpoint.pth", tmp_path / "model", to="huggingface")
    output = capsys.readouterr().out
    assert "a folder for transformers, 3 classes" in output
    assert "was in official format" in output
    detector = dino.load(tmp_path / "model")
    assert detector.preprocessing.max_detections == 50
    batch = random_batch(2)
    assert torch.equal(detector.network(*batch).decoder.boxes, network(*batch).decoder.boxes)
    convert_file(tmp_path / "model", tmp_path / "official.pth", to="official")
    state = weights_of(read_content(tmp_path / "official.pth"))
    assert recognise(state) == "official"
    assert equal(state, official_state(network))


def test_a_file_of_detrex(tmp_path):
    node = describe_fields(folders.FIELDS | {"backbone_kwargs": None, "num_feature_levels": 4, "shared_heads": False})
    from dino.weights.network_parts import build_network

    torch.save({"model": detrex_state(randomise(build_network({"network": node})))}, tmp_path / "detrex.pth")
    with pytest.raises(DataError, match="does not describe its model"):
        convert_file(tmp_path / "detrex.pth", tmp_path / "model", to="huggingface")
    assert os.listdir(tmp_path) == ["detrex.pth"]
