"""What people have from before the package got its rooms keeps working: checkpoints, run folders, recipes, programs.

tests/before_rooms was written by commit 4bcc1d5, as its README.md says. Nothing here names a module but by the
names that people and their files use.
"""

import importlib.util
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms

from .d2.processes import environment

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "before_rooms"
DESCRIPTIONS = json.loads((FOLDER / "descriptions.json").read_text())
RUNS = ("run", "tuned_run")
WITHOUT_DETECTRON2 = ("resnet", "torchvision", "plain")
# Several command lines in one process, because most of their time goes into imports; their outputs, then their codes:
MANY_PROGRAMS = """
import json, runpy, sys, traceback
codes = []
for sys.argv in json.loads(sys.argv[1]):
    try:
        codes.append(runpy.run_path(sys.argv[0], run_name="__main__") and None)
    except SystemExit as end:
        codes.append(end.code)
    except BaseException:
        codes.append(traceback.format_exc())
print("\\n" + json.dumps([str(code or "") for code in codes]))
"""


def unpack(folder):
    """What a person has in one place: the data, the recipes, and the folders of two runs that were killed."""
    for name in ("data", "recipe.py", "tuned.py", "mine.py"):
        (folder / name).symlink_to(FOLDER / name)
    for name in RUNS:
        with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("as_it_was"))


def run_programs(folder, **command_lines):
    """Run tools in `folder` -> "", or what went wrong, for each."""
    lines = [[str(ROOT / "tools" / words[0]), *map(str, words[1:])] for words in command_lines.values()]
    command = [sys.executable, "-c", MANY_PROGRAMS, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(command_lines, json.loads(done.stdout.splitlines()[-1]), strict=True))


# Weights, pictures and measures for checkpoints whose weights would be too large to keep.


def made_up(key, shape):
    """Weights of moderate size that depend on their name alone, in whatever version of PyTorch."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) > 1:
        values /= np.sqrt(np.prod(shape[1:]))
    elif key.endswith("running_var"):
        values = 1 + abs(values) / 10
    else:
        values = values / 10 + key.endswith(("weight", "gamma"))
    return torch.tensor(values, dtype=torch.float32)


def state_of(entry):
    """The state dict that a description belongs to; of integers the values themselves are kept."""
    base = {key: kept for key, kept in DESCRIPTIONS["base"].items() if key not in entry["lacks"]}
    return {
        key: torch.tensor(kept["values"]) if isinstance(kept, dict) else made_up(key, kept)
        for key, kept in {**base, **entry["state"]}.items()
    }


def current(state):
    """A state dict of an old file under the names of today: the neck's `coarser` is its `extra_levels`."""
    return {key.replace("neck.coarser.", "neck.extra_levels."): value for key, value in state.items()}


def pictures():
    """Two images (3, 64, 72), uint8."""
    arrays = [np.array(Image.open(FOLDER / f"data/image_{number}.png")) for number in (1, 3)]
    return [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]


def batch():
    """The pictures with their objects, as Detectron2 has them."""
    from detectron2.structures import Boxes, Instances

    content = json.loads((FOLDER / "data/annotations.json").read_text())
    inputs = []
    for number, image in zip((1, 3), pictures(), strict=True):
        objects = [x for x in content["annotations"] if x["image_id"] == number]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in objects)]
        labels = torch.tensor([entry["category_id"] - 1 for entry in objects])
        instances = Instances((64, 72), gt_boxes=Boxes(torch.tensor(corners)), gt_classes=labels)
        inputs.append({"file_name": str(number), "image": image, "height": 64, "width": 72, "instances": instances})
    return inputs


@torch.no_grad()
def predictions(network):
    """Some logits and boxes of the last layer, as one list."""
    images = (torch.stack(pictures()) - 116.0) / 57.0  # (2, 3, 64, 72)
    found = network.eval()(images, torch.zeros(2, 64, 72, dtype=torch.bool)).decoder
    return [*found.logits[-1, :, :3].flatten().tolist(), *found.boxes[-1, :, :3].flatten().tolist()]


def losses(detector):
    """The losses by name; their gradients must be finite, and there for every parameter that is trained."""
    torch.manual_seed(0)
    found = detector.train()(batch())
    sum(found.values()).backward()
    trained = [x for x in detector.parameters() if x.requires_grad]
    assert trained
    assert all(x.grad is not None and x.grad.isfinite().all() for x in trained)
    return {name: value.item() for name, value in found.items()}


@torch.no_grad()
def instances(detector):
    """Boxes with scores and classes behind them, of both pictures; not clipped, as that commit returned them."""
    from dino.d2.meta_arch import unclipped

    with unclipped(detector):
        found = [x["instances"] for x in detector.eval()([{**x, "instances": None} for x in batch()])]
    return [
        [*box, score, label]
        for x in found
        for box, score, label in zip(
            x.pred_boxes.tensor.tolist(), x.scores.tolist(), x.pred_classes.tolist(), strict=True
        )
    ]


def assert_same_detections(found, expected):
    """Each has its like, boxes within a tenth of a pixel; nearly equal scores may come in another order."""
    found, expected = np.array(found), np.array(expected)
    assert found.shape == expected.shape
    far = np.abs(found[:, None] - expected) / (0.1, 0.1, 0.1, 0.1, 5e-4, 0.1)  # (ours, theirs, 6)
    assert (far.max(2).min(0) < 1).all()
    assert (np.diff(found[: len(found) // 2, 4]) <= 0).all()


def join_by_nms(found, chosen, weights, width, overlap):
    """As that commit joined views; now they are joined one to one. So what each view finds is still compared."""
    boxes, scores, labels = (torch.cat(values) for values in zip(*found, strict=True))
    mirrored = torch.tensor([view.mirrored for view, x in zip(chosen, found, strict=True) for _ in x.scores])
    back = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    boxes = torch.where(mirrored[:, None], back, boxes)
    best = batched_nms(boxes, scores, labels, overlap)[: len(found[0].scores)]
    return type(found[0])(boxes[best], scores[best], labels[best])


def build(config):
    """What Detectron2 makes of a description."""
    from detectron2.config import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.create(config))


def write_checkpoint(entry, path):
    """The file that a description was taken from, with other weights."""
    torch.save({"model": state_of(entry), "names": entry["names"], "about": entry["about"]}, path)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Both runs continued, by recipe and by `config.yaml`; one started from weights; an evaluation of the plain program
    -> the folder, and how each program ended.
    """
    folder = unpack(tmp_path_factory.mktemp("programs"))
    write_checkpoint(DESCRIPTIONS["checkpoints"]["plain"], folder / "plain.pth")
    sizes = ("--size", 96, "--embed-dim", 32, "--layers", 1, "--queries", 12, "--workers", 0, "--device", "cpu")
    val = ("--val-json", "data/annotations.json", "--val-images", "data", "--output", "out")
    lines = {"plain": ("plain_train.py", *val, "--eval-only", "--weights", "plain.pth", *sizes)}
    if importlib.util.find_spec("detectron2"):
        train = ("lazyconfig_train_net.py", "--config-file")
        short = ("train.max_iter=1", "train.eval_period=0", "train.output_dir=afresh")
        lines["run"] = (*train, "recipe.py", "--resume")
        lines["tuned_run"] = (*train, "tuned_run/config.yaml", "--resume")
        lines["afresh"] = (*train, "tuned.py", "train.init_checkpoint=tuned_run/model_best.pth", *short)
    return folder, run_programs(folder, **lines)


# Checkpoints


@pytest.mark.parametrize("name", DESCRIPTIONS["checkpoints"])
def test_models_are_rebuilt_from_their_checkpoints(name, tmp_path):
    """Every kind of class path that a description can hold."""
    if name not in WITHOUT_DETECTRON2:
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    if name == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    from dino.rebuild import model_from_checkpoint

    entry = DESCRIPTIONS["checkpoints"][name]
    write_checkpoint(entry, tmp_path / "model.pth")
    found = model_from_checkpoint(tmp_path / "model.pth")
    assert found.names == ["red", "green", "blue"]
    sizes = {"plain": (96, 192, 100)}.get(name, (48, 96, 10))
    assert (found.preprocessing.short_side, found.preprocessing.max_size, found.preprocessing.max_detections) == sizes
    assert predictions(found.network) == pytest.approx(entry["predictions"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in DESCRIPTIONS["checkpoints"] if name != "plain"])
def test_described_detectors_train(name, monkeypatch):
    """Detector and criterion too, which no program builds from a checkpoint's description, but from its recipe."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    if name == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    if name == "tta":
        monkeypatch.setattr("dino.d2.tta.join", join_by_nms)
    entry = DESCRIPTIONS["checkpoints"][name]
    detector = build(json.loads(entry["about"]["config"]))
    detector.network.load_state_dict(state_of(entry))
    assert_same_detections(instances(detector), entry["instances"])
    assert losses(detector) == pytest.approx(entry["losses"], rel=1e-4, abs=1e-5)


def test_plain_checkpoint_is_evaluated(programs):
    """By the program that wrote it."""
    folder, ends = programs
    assert ends["plain"] == ""
    (results,) = folder.glob("out/**/results.json")
    found = [x for x in json.loads(results.read_text()) if x["image_id"] == 1]
    rows = [[*x["bbox"], x["score"], x["category_id"]] for x in found]
    assert_same_detections(rows, DESCRIPTIONS["checkpoints"]["plain"]["results"])


@pytest.mark.parametrize("copy", ["auto", "model"])
def test_predictor_finds_what_it_found(files, copy):
    """With averaged weights and with those as trained, of the checkpoint that a run can continue from."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dino.predictor import Predictor

    predictor = Predictor.from_checkpoint(files / "run/model_0000002.pth", score_thresh=0, copy=copy)
    found = predictor(FOLDER / "data/image_1.png")
    rows = [
        [*box, score, label]
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    assert_same_detections(rows, DESCRIPTIONS["predictor"][copy])
    assert found.names == [("red", "green", "blue")[label] for label in found.labels]


def test_best_weights_load_into_a_model(files):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dino.weights import load_weights, read_content

    content = read_content(files / "run/model_best.pth")
    model = build(json.loads(content["about"]["config"]))
    load_weights(model, files / "run/model_best.pth")
    expected = current(content["model"])
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


# Run folders and recipes


def read_metrics(path):
    """Iteration -> losses, learning rate and number of skipped steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert len({line["iteration"] for line in steps}) == len(steps)
    return {
        line["iteration"]: {k: v for k, v in line.items() if "loss" in k or k in ("lr", "skipped_steps")}
        for line in steps
    }


@pytest.mark.parametrize(("run", "precision"), [("run", 1e-5), ("tuned_run", 2e-3)])
def test_interrupted_runs_reach_what_the_whole_ones_did(programs, run, precision):
    """The first in float32 with averaged weights and a skipped step, the other in float16 with a scaled loss."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    folder, ends = programs
    assert ends[run] == ""
    whole, ours = folder / run / "whole", folder / run
    expected, found = read_metrics(whole / "metrics.json"), read_metrics(ours / "metrics.json")
    assert list(found) == list(expected) == list(range(6))
    for iteration, values in expected.items():
        assert found[iteration] == pytest.approx(values, rel=precision, abs=precision / 10), iteration
    final, state = (torch.load(x, weights_only=True) for x in (whole / "final.pth", ours / "model_final.pth"))
    assert state["trainer"]["iteration"] == 5
    assert state["trainer"]["scaler"] == final["scaler"]
    assert state["trainer"]["skipped"] == final["skipped"]
    for kind in ("model", "ema"):
        averaged = state.get("ema", {}).get("model", {})
        weights = state["model"] if kind == "model" else averaged
        expected = current(final[kind])
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=precision, atol=20 * precision, msg=key)
    assert [entry["iteration"] for entry in json.loads((ours / "evaluations.json").read_text())] == [3, 6]


def test_training_from_old_weights(programs):
    """By a recipe that takes most from another one beside it."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    folder, ends = programs
    assert ends["afresh"] == ""
    (found,) = read_metrics(folder / "afresh/metrics.json").values()
    assert found == pytest.approx(DESCRIPTIONS["afresh"], rel=2e-3)


def test_recipe_made_as_the_documentation_says(files, monkeypatch):
    """It loads a recipe of this repository by name, with the parts and keys that it had."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import LazyConfig
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.chdir(files)
    try:
        cfg = LazyConfig.load("mine.py")
    finally:
        DatasetCatalog.pop("before_cells", None)
        MetadataCatalog.pop("before_cells", None)
    assert {"dataloader", "lr_multiplier", "model", "optimizer", "train"} <= set(cfg)
    assert build(cfg.model).network.query_selection.content.weight.shape == (200, 128)


def test_every_path_that_files_name():
    """Functions in a `config.yaml` too: YAML imports the module that it names, so an alias elsewhere is not enough."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    missing = []
    for path in (FOLDER / "paths.txt").read_text().split():
        module, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{path}: {error}")
        else:
            assert callable(found), path
    assert not missing


# Yacs


def test_yacs_configuration(tmp_path):
    """A configuration that was dumped, and a checkpoint of DefaultTrainer's, through Detectron2's own loader."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from dino.d2 import add_dino_config

    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.merge_from_file(str(FOLDER / "yacs.yaml"))
    model = build_model(cfg)
    entry = DESCRIPTIONS["yacs"]
    state = {f"network.{key}": value for key, value in state_of(entry).items()}
    assert current(state).keys() == model.state_dict().keys()
    torch.save({"model": state}, tmp_path / "model.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert_same_detections(instances(model), entry["instances"])
    assert losses(model) == pytest.approx(entry["losses"], rel=1e-4, abs=1e-5)
