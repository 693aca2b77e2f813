import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dino
from dino.utils.files import DataError
from dino.weights import description
from dino.weights.description import Preprocessing, detector_from_checkpoint, model_from_checkpoint
from dino.weights.network_parts import check_description as _check

from ..tiny import random_batch
from .states import randomise

RESNET = {
    "_target_": "detectron2.modeling.ResNet",
    "stem": {"_target_": "detectron2.modeling.backbone.BasicStem", "in_channels": 3, "out_channels": 64, "norm": "BN"},
    "stages": {"_target_": "detectron2.modeling.ResNet.make_default_stages", "depth": 18, "norm": "BN"},
    "out_features": ["res3", "res4", "res5"],
    "freeze_at": 2,
}
TORCHVISION = {"_target_": "dino.modeling.TorchvisionBackbone", "name": "resnet18", "norm": "BN"}


def network(**changes):
    """The description of a small network."""
    small = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
    small |= {"num_classes": 3, "num_queries": 12, "num_denoising": 6}
    return {"_target_": "dino.modeling.build_dino", "backbone": TORCHVISION, **small, **changes}


def write_content(path, described=None, **content):
    """A checkpoint without weights, but with a description, or with other content."""
    about = {"config": json.dumps({"network": described or network()}), "preprocessing": Preprocessing()._asdict()}
    torch.save({"names": ["a", "b", "c"], "about": about, **content}, path)


def write(path, described=None, **content):
    """A checkpoint of the small, or the described, network with random weights, or with other content."""
    model = randomise(description.build_network({"network": described or network()})).eval()
    write_content(path, described, **{"model": model.state_dict(), **content})
    return model


@torch.no_grad()
@pytest.mark.parametrize("backbone", [TORCHVISION, RESNET])
def test_a_network_comes_back(tmp_path, backbone):
    model = write(tmp_path / "model.pth", network(backbone=backbone))
    found = model_from_checkpoint(tmp_path / "model.pth")
    assert found.names == ["a", "b", "c"]
    assert found.preprocessing == Preprocessing()
    assert not found.network.training
    batch = random_batch(2)
    assert torch.equal(found.network(*batch).decoder.boxes, model(*batch).decoder.boxes)


def test_averages_are_taken(tmp_path):
    raw = description.build_network({"network": network()})
    averaged = write(tmp_path / "averaged.pth")
    write(tmp_path / "model.pth", model=raw.state_dict(), ema={"model": averaged.state_dict(), "updates": 3})
    assert torch.equal(model_from_checkpoint(tmp_path / "model.pth").network.level_embed, averaged.level_embed)
    found = model_from_checkpoint(tmp_path / "model.pth", copy="model")
    assert torch.equal(found.network.level_embed, raw.level_embed)


def touch(path):
    return {"_target_": "os.system", "command": f"touch {path}"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda p: touch(p), r"'os\.system' is not on the list"),
        (lambda p: network(backbone=touch(p)), r"'os\.system' is not on the list"),
        (lambda p: network(backbone={"_target_": "os.mkdir", "path": "made"}), "'os.mkdir' is not on the list"),
        (lambda p: network(backbone={"_target_": "builtins.eval"}), "'builtins.eval' is not on the list"),
        (
            lambda p: network(backbone={"_target_": "dino.layers.ops.build.build"}),
            "'dino.layers.ops.build.build' is not on the list",
        ),
        *(
            (lambda p, target=target: network(backbone={"_target_": target}), f"'{target}' is not on the list")
            for target in (
                "detectron2.modeling:FPN",
                "detectron2.utils.env.setup_environment",
                "dino.d2.detectron2_backbones",
                "dino.d2.DINODetector",
                "dino.modeling.use_float32_precision",
                "dino.rebuild.model_from_checkpoint",
            )
        ),
        (lambda p: network(backbone={"_target_": ["os.system"]}), "is no name of a part"),
        (lambda p: network(backbone={"_target_": {"_target_": "os.system"}}), "is no name of a part"),
        (lambda p: network(backbone={**TORCHVISION, "name": "hf-hub:someone/model"}), "can't name addresses and paths"),
        (
            lambda p: network(backbone={**TORCHVISION, "name": "https://host/model.pth"}),
            "can't name addresses and paths",
        ),
        (lambda p: network(backbone={**TORCHVISION, "name": "../../model"}), "can't name addresses and paths"),
        (lambda p: network(backbone={**TORCHVISION, "weights": "IMAGENET1K_V1"}), "'weights' would read or download"),
        (
            lambda p: network(backbone={**TORCHVISION, "weights": {"_target_": "dino.modeling.variants.SecondPass"}}),
            "'weights' would read or download",
        ),
        (lambda p: network(backbone={**TORCHVISION, "options": {"pretrained": True}}), "'pretrained' would read or"),
        (lambda p: network(num_classes="!!python/object/apply:os.system ['ls']"), "no plain word"),
        (lambda p: network(width=3), "TypeError: .*width"),
        (lambda p: network(num_queries=-1), "RuntimeError"),
        (lambda p: TORCHVISION, "a DINO was expected, not TorchvisionBackbone"),
        (lambda p: [1], "a DINO was expected, not list"),
    ],
)
def test_other_parts_are_refused(tmp_path, monkeypatch, bad, message):
    monkeypatch.chdir(tmp_path)
    write_content(tmp_path / "bad.pth", bad(tmp_path / "trace"))
    with pytest.raises(DataError, match=rf"can't build the model of .*bad\.pth: .*({message})"):
        model_from_checkpoint(tmp_path / "bad.pth")
    assert os.listdir(tmp_path) == ["bad.pth"]


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch trace']", "network: !!python/name:os.system ''", "[", "1", "[]"]
)
def test_descriptions_are_json_and_nothing_else(tmp_path, monkeypatch, text):
    """A yaml tag would build any Python object, had it been read by Detectron2's unsafe loader."""
    monkeypatch.chdir(tmp_path)
    about = {"config": text, "preprocessing": Preprocessing()._asdict()}
    write_content(tmp_path / "bad.pth", about=about)
    with pytest.raises(DataError, match=r"can't build the model of .*bad\.pth: "):
        model_from_checkpoint(tmp_path / "bad.pth")
    assert os.listdir(tmp_path) == ["bad.pth"]


@pytest.mark.parametrize(
    "content",
    [{"about": None}, {"about": {}}, {"about": {"config": {}}}, {"names": None}, {"names": "abc"}, {"names": [1]}],
)
def test_files_without_a_description(tmp_path, content):
    write_content(tmp_path / "model.pth", **content)
    with pytest.raises(DataError, match=r"model\.pth does not describe its model.*dino convert"):
        model_from_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_std": [0, 1, 1]},
        {"pixel_mean": [1, 2]},
        {"pixel_mean": "abc"},
        {"pixel_mean": [10**400, 1, 1]},
        {"pixel_mean": [float("nan"), 1, 1]},
        {"short_side": 0},
        {"short_side": 1.5},
        {"max_size": "big"},
        {"max_detections": None},
        {"more": 1},
        {"input_range": [1, 0]},
        {"input_range": [0, 1, 2]},
        {"input_range": "ab"},
        {"input_range": [0, float("inf")]},
        {"input_range": [float("nan"), 1]},
        {"input_range": [0, 10**400]},
    ],
)
def test_preprocessing_must_make_sense(tmp_path, change):
    about = {"config": json.dumps({"network": network()}), "preprocessing": Preprocessing()._asdict() | change}
    write_content(tmp_path / "model.pth", about=about)
    with pytest.raises(DataError, match=rf"preprocessing.*{next(iter(change)) if 'more' not in change else 'dict'}"):
        model_from_checkpoint(tmp_path / "model.pth")


def test_the_range_of_deep_images(tmp_path):
    """Files from before the setting have no such key."""
    before = {key: value for key, value in Preprocessing()._asdict().items() if key != "input_range"}
    for stored, expected in ((before, None), (before | {"input_range": [0, 4095.5]}, (0, 4095.5))):
        write(tmp_path / "model.pth", about={"config": json.dumps({"network": network()}), "preprocessing": stored})
        assert model_from_checkpoint(tmp_path / "model.pth").preprocessing.input_range == expected
    del before["short_side"]
    write(tmp_path / "model.pth", about={"config": json.dumps({"network": network()}), "preprocessing": before})
    with pytest.raises(DataError, match="preprocessing must be a dict"):
        model_from_checkpoint(tmp_path / "model.pth")


def test_weights_must_be_whole(tmp_path):
    model = write(tmp_path / "model.pth")
    state = {k: v for k, v in model.state_dict().items() if k != "level_embed"}
    write(tmp_path / "less.pth", model=state)
    with pytest.raises(DataError, match=r"less\.pth"):
        model_from_checkpoint(tmp_path / "less.pth")
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.layers.0.norm.weight"}
    write(tmp_path / "less.pth", model=state)
    with pytest.raises(DataError, match=r"less\.pth lacks weights of its own model: encoder\.layers\.0\.norm"):
        model_from_checkpoint(tmp_path / "less.pth")
    write(tmp_path / "less.pth", names=["a"])
    with pytest.raises(DataError, match="1 names for 3 classes"):
        model_from_checkpoint(tmp_path / "less.pth")


@pytest.mark.parametrize(
    "change", [{"stages": {**RESNET["stages"], "norm": "GN"}}, {"stages": {**RESNET["stages"], "stride_in_1x1": True}}]
)
def test_resnets_that_only_detectron2_has(tmp_path, change):
    write_content(tmp_path / "model.pth", network(backbone={**RESNET, **change}))
    with pytest.raises(DataError, match="is not torchvision's"):
        model_from_checkpoint(tmp_path / "model.pth")


def test_nothing_is_imported_but_for_a_name_on_the_list(tmp_path):
    """A module of the search path would run its code at import, whatever the import found in it."""
    (tmp_path / "detectron2_evil.py").write_text("open('trace', 'w')")
    targets = ("detectron2_evil.part", "detectron2_evil:part", "detectron2_evil")
    for number, target in enumerate(targets):
        write_content(tmp_path / f"{number}.pth", network(backbone={"_target_": target}))
    code = """
from dino.weights.description import model_from_checkpoint
from dino.weights.network_parts import check_description as _check
for number in range(3):
    try:
        model_from_checkpoint(f"{number}.pth")
    except ValueError as error:
        print("is not on the list" in str(error))
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["True"] * 3, result.stderr
    assert not (tmp_path / "trace").exists()


@torch.no_grad()
def test_a_detector_comes_back(tmp_path):
    model = write(tmp_path / "model.pth")
    for detector in (detector_from_checkpoint(tmp_path / "model.pth"), dino.load(tmp_path / "model.pth", copy="model")):
        assert isinstance(detector, dino.Detector)
        assert not detector.training
        assert (detector.names, detector.preprocessing) == (["a", "b", "c"], Preprocessing())
        batch = random_batch(2)
        assert torch.equal(detector.network(*batch).decoder.boxes, model(*batch).decoder.boxes)


def test_backbones_of_detectron2_without_it(tmp_path):
    """ResNets are built from torchvision's; others say what they need."""
    write(tmp_path / "resnet.pth", network(backbone=RESNET))
    write_content(tmp_path / "swin.pth", network(backbone={"_target_": "detectron2.modeling.SwinTransformer"}))
    code = f"""
import sys
sys.modules["detectron2"] = None
from dino.weights.description import model_from_checkpoint
from dino.weights.network_parts import check_description as _check
print(model_from_checkpoint({str(tmp_path / "resnet.pth")!r}).names)
model_from_checkpoint({str(tmp_path / "swin.pth")!r})
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.stdout.strip() == "['a', 'b', 'c']"
    assert "detectron2.modeling.SwinTransformer needs Detectron2, which is not installed here" in result.stderr


def test_a_branch_may_have_the_name_of_an_argument_that_reads_files():
    second = {"_target_": "dino.modeling.variants.SecondPass"}
    _check({"_target_": "dino.modeling.variants.branches.Branches", "file": second})
    with pytest.raises(DataError, match="'file' would read or download"):
        _check({"_target_": "dino.modeling.variants.branches.Branches", "file": "weights.pth"})


def test_category_ids(tmp_path):
    write(tmp_path / "old.pth")
    assert detector_from_checkpoint(tmp_path / "old.pth").category_ids == [1, 2, 3]
    write(tmp_path / "model.pth", category_ids=[42, 7, 0])
    assert detector_from_checkpoint(tmp_path / "model.pth").category_ids == [42, 7, 0]


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 2], [1, 2, 3.0], [1, 2, True], [1, 2, 2**70], "123", {1: 1}, None, []])
def test_broken_category_ids_are_named(tmp_path, ids):
    write(tmp_path / "model.pth", category_ids=ids)
    with pytest.raises(DataError, match=r"model.pth: category_ids must be 3 different whole numbers"):
        detector_from_checkpoint(tmp_path / "model.pth")
