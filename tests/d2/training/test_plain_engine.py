"""The plain engine against Detectron2's: the same recipe, the same images, the same steps, files for each other."""

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from dino.d2 import recipe
from dino.d2.training import engine
from dino.training import recipe_training
from dino.training.metrics_file import read_metrics
from dino.training.recipe_completion import DataFiles, complete
from dino.training.recipe_reading import read_recipe
from dino.utils.files import DataError
from dino.weights import resnet_to_detectron2

from ...training.tiny_recipe import SHRINK, SMALL, write_sets
from ...training.tiny_recipe import tiny_recipe as plain_recipe
from ..recipes import tiny_recipe

COUNTS = (2, 0, 3, 1, 2, 1)
SETTINGS = ("train.ema.enabled=True", "train.max_iter=4", "train.eval_period=2", "train.checkpointer.period=2")


def run_detectron2(folder, *overrides, resume=False):
    folder.mkdir(exist_ok=True)
    return engine.train(tiny_recipe(folder, *SETTINGS, *overrides, counts=COUNTS), resume)


def run_plain(folder, *overrides, resume=False):
    return recipe_training.train(plain_recipe(folder, *SETTINGS, *overrides, counts=COUNTS), resume=resume)


ENGINES = {"detectron2": run_detectron2, "plain": run_plain}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take most of the time of a tiny run."""
    for module in (engine, recipe_training):
        monkeypatch.setattr(module, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of each engine, and its results."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: (folder / name, run(folder / name)) for name, run in ENGINES.items()}


def read_plain(folder, name="model_final"):
    return torch.load(folder / f"run/{name}.pth", weights_only=True)


def metrics(folder):
    """Iteration -> losses, rate and results, of one or more lines."""
    found = {}
    for line in map(json.loads, (folder / "run/metrics.json").read_text().splitlines()):
        found.setdefault(line["iteration"], {}).update(line)
    of_the_clock = ("time", "data_time", "rank_data_time", "eval_time")
    return {i: {k: v for k, v in line.items() if not k.endswith(of_the_clock)} for i, line in found.items()}


def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)


def test_both_write_the_same_numbers(runs):
    """A step moves a weight by the rate, 2e-4, whatever its gradient is: rounding reaches 1e-5 in a few of them."""
    (plain, results), (detectron2, others) = runs["plain"], runs["detectron2"]
    ours, theirs = metrics(plain), metrics(detectron2)
    assert ours.keys() == theirs.keys()
    for iteration, line in ours.items():
        assert line == pytest.approx(theirs[iteration], rel=1e-4, abs=1e-6, nan_ok=True), iteration
    for kind in ("raw", "averaged"):
        one, other = (x["bbox"] if kind == "raw" else x["ema"]["bbox"] for x in (results, others))
        assert one == pytest.approx(dict(other), nan_ok=True)
    records = [json.loads((folder / "run/evaluations.json").read_text()) for folder in (plain, detectron2)]
    assert [entry.keys() for entry in records[0]] == [entry.keys() for entry in records[1]]


def test_both_write_the_same_checkpoint(runs):
    ours, theirs = (read_plain(runs[name][0]) for name in ("plain", "detectron2"))
    assert ours.keys() == theirs.keys()
    assert ours["about"].keys() == theirs["about"].keys()
    for key in ("config", "preprocessing", "data", "seed"):
        assert ours["about"][key] == theirs["about"][key], key
    for key in ("names", "category_ids", "iteration"):
        assert ours[key] == theirs[key]
    assert ours["model"].keys() == theirs["model"].keys()
    assert_close(ours["model"], theirs["model"])
    assert_close(ours["ema"], theirs["ema"])
    assert set(theirs["trainer"]) - set(ours["trainer"]) <= {"hooks"}
    assert_close(ours["trainer"]["optimizer"]["state"], theirs["trainer"]["optimizer"]["state"], atol=1e-4)
    best = [read_plain(runs[name][0], "model_best") for name in ("plain", "detectron2")]
    assert best[0].keys() == best[1].keys()


@pytest.mark.parametrize(("first", "second"), [("plain", "detectron2"), ("detectron2", "plain")])
def test_each_continues_a_run_of_the_other(runs, tmp_path, first, second):
    ENGINES[first](tmp_path, "train.max_iter=2")
    for name in ("model_final.pth", "evaluations.json"):
        (tmp_path / "run" / name).unlink()
    ENGINES[second](tmp_path, resume=True)
    whole = read_plain(runs[second][0])
    assert read_plain(tmp_path)["trainer"]["iteration"] == 3
    assert_close(read_plain(tmp_path)["model"], whole["model"], atol=5e-5)
    assert_close(read_plain(tmp_path)["ema"], whole["ema"], atol=5e-5)


@pytest.mark.parametrize(("first", "second"), [("plain", "detectron2"), ("detectron2", "plain")])
def test_each_starts_from_a_checkpoint_of_the_other(runs, tmp_path, first, second):
    weights = runs[first][0] / "run/model_final.pth"
    start = ("train.max_iter=1", "train.eval_period=0", "optimizer.lr=0", f"train.init_checkpoint={weights}")
    ENGINES[second](tmp_path, *start)
    before, after = (torch.load(x, weights_only=True)["model"] for x in (weights, tmp_path / "run/model_final.pth"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("plain", "detectron2"), ("detectron2", "plain")])
def test_a_run_with_a_resnet_continues_in_its_own_engine_only(tmp_path, first, second):
    """Detectron2's ResNets call their tensors otherwise than torchvision's, and have them in another order."""
    files = DataFiles(*(part for pair in write_sets(tmp_path) for part in pair))
    given = [*SHRINK, f"train.output_dir={tmp_path / 'run'}", "train.max_iter=1", "train.eval_period=0"]
    loaders = {"detectron2": recipe.load_recipe, "plain": lambda *args: complete(read_recipe(args[0]), *args[1:])}
    trainers = {"detectron2": engine.train, "plain": recipe_training.train}
    trainers[first](loaders[first](str(SMALL), given, files), resume=False)
    cfg = loaders[second](str(SMALL), given, files)
    with pytest.raises(DataError, match=r"the other engine wrote it .*--weights"):
        trainers[second](cfg, resume=True)
    states = []
    for name in ENGINES:  # from these weights, both take the same steps
        cfg = loaders[name](str(SMALL), given, files)
        cfg.train.update(output_dir=str(tmp_path / name), init_checkpoint=str(tmp_path / "run/model_final.pth"))
        cfg.train.max_iter = 3
        (tmp_path / name).mkdir()
        trainers[name](cfg, resume=False)
        content = torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        states.append(resnet_to_detectron2(content["model"]))
    losses = [[line["total_loss"] for line in read_metrics(tmp_path / name / "metrics.json")[:3]] for name in ENGINES]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    begin = resnet_to_detectron2(torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"])
    for key, value in states[0].items():  # rounding turns a few tiny gradients, and Adam's step with each
        moved, apart = (value - begin[key]).abs(), (value - states[1][key]).abs()
        assert apart.double().mean() <= 0.01 * moved.double().mean() + 1e-9, key
