"""Folders that `dino convert` writes are those that transformers reads and writes."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, DeformableDetrImageProcessor

import dino
import dino.hf
from dino.weights.transformers_folder import describe_fields

from ..tiny import random_batch
from ..weights import folders
from ..weights.folders import IDS, NAMES, write_tiny

HAS_NEW_PROCESSORS = hasattr(DeformableDetrImageProcessor, "_preprocess")  # 5.4 and newer
VARIANT = describe_fields(folders.FIELDS | {"shared_heads": False})
VARIANT["query_selection"]["_target_"] = "dino.modeling.variants.DistinctSelection"


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (no dict)


def fields_in(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"shared_heads": False, "num_denoising": 0}, {"network": VARIANT}])
def test_transformers_reads_what_convert_writes(tmp_path, fields):
    detector = write_tiny(tmp_path / "model", **fields)
    model, found = AutoModelForObjectDetection.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values()), found
    assert type(model) is dino.hf.DinoDetrForObjectDetection
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.category_ids == IDS
    expected = detector.network.state_dict()
    assert model.model.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.model.network.state_dict().items())
    heads = model.model.network.decoder.class_heads
    assert (heads[0].weight is heads[1].weight) == (not fields)
    images, padding = random_batch(2)
    outputs = model.eval()(images, pixel_mask=(~padding).long())
    assert torch.equal(outputs.pred_boxes, detector.network(images, padding).decoder.boxes[-1])


@pytest.mark.parametrize("fields", [{}, {"shared_heads": False}, {"network": VARIANT}])
def test_transformers_writes_the_same_folder(tmp_path, fields):
    write_tiny(tmp_path / "model", **fields)
    AutoModelForObjectDetection.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    AutoImageProcessor.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    (first, metadata), (second, again) = (tensors_of(tmp_path / name) for name in ("model", "again"))
    assert metadata == again == {"format": "pt"}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    ours, theirs = (fields_in(tmp_path / name) for name in ("model", "again"))
    changed = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert changed <= {"transformers_version", "use_pretrained_backbone", "backbone_kwargs"}
    assert describe_fields(ours) == describe_fields(theirs)
    ours, theirs = (fields_in(tmp_path / name, "preprocessor_config.json") for name in ("model", "again"))
    assert ours.items() <= theirs.items()
    if HAS_NEW_PROCESSORS:  # others write their own defaults too
        assert ours == theirs
    first, second = (AutoImageProcessor.from_pretrained(tmp_path / name).to_dict() for name in ("model", "again"))
    assert first == second


def test_a_model_of_transformers_is_a_checkpoint(tmp_path):
    config = AutoConfig.for_model("dino_detr", **folders.FIELDS, use_pretrained_backbone=False, category_ids=IDS)
    model = AutoModelForObjectDetection.from_config(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="200KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    for name in ("one", "several"):
        detector = dino.load(tmp_path / name)
        assert (detector.names, detector.category_ids) == (["LABEL_0", "LABEL_1", "LABEL_2"], IDS)
        expected = model.model.network.state_dict()
        assert detector.network.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in detector.network.state_dict().items())
