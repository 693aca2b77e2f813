"""Training of a recipe without Detectron2: its files, an exact resume, precision, accumulation, faults."""

import json
import os
import signal

import pytest
import torch
from PIL import Image

from dino.inference.predictor import Predictor
from dino.layers.matching_metrics import MatchingMetrics
from dino.training import recipe_training
from dino.training.recipe_completion import DataFiles, complete
from dino.training.recipe_reading import read_recipe
from dino.training.recipe_step import RecipeStep
from dino.training.stop_signal import Stopped
from dino.utils.files import DataError, UserError

from ..coco_files import write_coco
from ..d2.processes import assert_same
from .tiny_recipe import LOSSLESS as WHOLE
from .tiny_recipe import SHRINK, SMALL, shrink, tiny_recipe

COUNTS = (2, 0, 3, 1, 2, 1)


def read_plain(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def entries(folder):
    return [json.loads(line) for line in (folder / "run/metrics.json").read_text().splitlines()]


def losses(folder, *names):
    """(iteration, total loss and values of these names) of each log."""
    names = ("iteration", "total_loss", *names)
    return [tuple(x[name] for name in names) for x in entries(folder) if "total_loss" in x]


def train(folder, *overrides, resume=False, counts=COUNTS, change=lambda cfg: None, **options):
    cfg = tiny_recipe(folder, *overrides, counts=counts, **options)
    change(cfg)
    return recipe_training.train(cfg, resume=resume)


@pytest.fixture(autouse=True)
def no_curves():
    """They take most of the time of a tiny run; `unbroken`, which comes first, has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_training, "draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run of six iterations with two evaluations, and its results."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(folder, *WHOLE)


def test_the_files_of_a_run(unbroken):
    folder, results = unbroken
    written = {str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*") if path.is_file()}
    assert written == {
        *("config.yaml", "metrics.json", "evaluations.json", "last_checkpoint"),
        *("model_0000001.pth", "model_0000003.pth", "model_0000005.pth", "model_final.pth", "model_best.pth"),
        *("curves.png", "train_batch.png", "val_predictions.png"),
        *(f"inference/{part}coco_instances_results.json" for part in ("", "averaged/")),
    }
    assert 0 <= results["bbox"]["AP"] <= 100
    assert {"AP50", "AP-red", "AP-green", "AP-blue"} <= set(results["ema"]["bbox"])
    for name in ("curves", "train_batch", "val_predictions"):
        Image.open(folder / f"run/{name}.png").verify()


def test_metrics(unbroken):
    first, *_, last = entries(unbroken[0])
    assert len([key for key in first if key.startswith("loss_")]) == 3 * 5  # two layers, proposals, denoising of both
    assert {"total_loss", "lr", "time", "data_time", "skipped_steps"} <= set(first)
    assert sum(value for key, value in first.items() if key.startswith("loss_")) == pytest.approx(first["total_loss"])
    assert set(MatchingMetrics.NAMES) <= set(first)
    assert 0 <= first["class_error"] <= 100
    assert any("grad_norm" in x for x in entries(unbroken[0]))
    assert first["lr"] == pytest.approx(2e-4)
    assert entries(unbroken[0])[-2]["lr"] == pytest.approx(2e-5)  # the last fifth at a tenth
    assert last["iteration"] == 6
    assert {"bbox/AP", "ema/bbox/AP"} <= set(last)


def test_the_checkpoint(unbroken):
    content = read_plain(unbroken[0] / "run/model_final.pth")
    assert set(content) == {"model", "trainer", "ema", "iteration", "names", "category_ids", "about"}
    assert content["names"] == ["red", "green", "blue"]
    assert content["category_ids"] == [1, 2, 3]
    assert content["iteration"] == content["trainer"]["iteration"] == 5
    assert content["ema"]["updates"] == 6
    assert content["trainer"]["scaler"]
    assert {"config", "preprocessing", "recipe", "seed", "commit", "data", "torch", "dino"} == set(content["about"])
    best = read_plain(unbroken[0] / "run/model_best.pth")
    assert best["metric"] == "bbox/AP"
    assert "trainer" not in best


def assert_same_run(folder, unbroken):
    ours, theirs = (read_plain(x / "run/model_final.pth") for x in (folder, unbroken))
    for state in (ours, theirs):
        del state["about"]["commit"], state["about"]["recipe"], state["about"]["seed"]
    assert_same(ours, theirs)
    assert losses(folder, *MatchingMetrics.NAMES) == losses(unbroken, *MatchingMetrics.NAMES)
    assert [iteration for iteration, _ in losses(folder)] == list(range(6))
    ours, theirs = (json.loads((x / "run/evaluations.json").read_text()) for x in (folder, unbroken))
    assert ours == theirs
    assert [entry["iteration"] for entry in ours] == [3, 6]


class Killed(BaseException):
    pass


def at(monkeypatch, iteration, act):
    """Call `act` once, before the step of an iteration."""
    take, left = RecipeStep.take, [iteration]

    def stop(step, parts):
        if [step.iter] == left:
            left.clear()
            act()
        take(step, parts)

    monkeypatch.setattr(RecipeStep, "take", stop)


def kill():
    raise Killed


def test_killed_and_resumed(tmp_path, unbroken, monkeypatch):
    """In the fourth iteration: two are in the checkpoint, one is lost and done again."""
    at(monkeypatch, 3, kill)
    with pytest.raises(Killed):
        train(tmp_path, *WHOLE)
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_0000001.pth"
    train(tmp_path, *WHOLE, resume=True)
    assert_same_run(tmp_path, unbroken[0])


def test_stopped_by_a_signal_and_resumed(tmp_path, unbroken, monkeypatch):
    at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    whole = [*WHOLE, "train.checkpointer.period=100"]
    with pytest.raises(Stopped, match="stopped after 3 iterations; --resume continues") as stopped:
        train(tmp_path, *whole)
    assert stopped.value.code == 143
    assert not (tmp_path / "run/model_final.pth").exists()
    train(tmp_path, *whole, resume=True)
    assert_same_run(tmp_path, unbroken[0])


def test_a_resumed_run_repeats_an_evaluation_that_was_missed(tmp_path, unbroken, monkeypatch):
    every = [*WHOLE, "train.checkpointer.period=3"]
    monkeypatch.setattr(recipe_training, "evaluate", lambda *_: kill())
    with pytest.raises(Killed):
        train(tmp_path, *every)
    monkeypatch.undo()
    assert not (tmp_path / "run/evaluations.json").exists()
    train(tmp_path, *every, resume=True)
    assert_same_run(tmp_path, unbroken[0])


def test_a_damaged_checkpoint_is_passed_over_and_the_seed_stays(tmp_path, unbroken, monkeypatch, caplog):
    at(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        train(tmp_path, *WHOLE)
    (tmp_path / "run/model_0000003.pth").write_bytes(b"cut")
    train(tmp_path, *WHOLE, "train.seed=8", resume=True)
    assert "the seed is that of the run which is continued: 7, not 8" in caplog.text
    assert "model_0000003.pth is cut short or no checkpoint: the run continues from" in caplog.text
    assert_same_run(tmp_path, unbroken[0])


def test_the_checkpoint_of_another_model_is_refused(tmp_path, unbroken):
    cfg = tiny_recipe(tmp_path, *WHOLE, "model.network.decoder.num_layers=1")
    cfg.train.output_dir = str(unbroken[0] / "run")
    before = sorted(path.name for path in (unbroken[0] / "run").iterdir())
    with pytest.raises(DataError, match=r"can't continue from .*model_final\.pth: its optimizer is not the recipe's"):
        recipe_training.train(cfg, resume=True)
    assert sorted(path.name for path in (unbroken[0] / "run").iterdir()) == before


def test_its_checkpoint_starts_another_run_and_predicts(tmp_path, unbroken):
    weights = str(unbroken[0] / "run/model_final.pth")
    train(tmp_path, "train.max_iter=1", "train.eval_period=0", "optimizer.lr=0", f"train.init_checkpoint={weights}")
    first, second = (read_plain(path)["model"] for path in (weights, tmp_path / "run/model_final.pth"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def one_step(folder, *overrides):
    """Losses and weights after a step; images of one size, with one object each, and no denoising."""
    fixed = ("train.max_iter=1", "train.eval_period=0", "model.network.denoising.num_denoising=0", *overrides)
    train(folder, *fixed, "dataloader.train.total_batch_size=4", counts=(1, 1, 1, 1))
    return losses(folder), read_plain(folder / "run/model_final.pth")["model"]


def test_parts_of_a_batch_are_the_whole_batch(tmp_path):
    (whole, weights), (parts, others) = one_step(tmp_path / "1"), one_step(tmp_path / "2", "train.grad_accum_steps=2")
    assert parts[0][1] == pytest.approx(whole[0][1], rel=1e-5)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=2e-5)


def combine(cfg):
    parts = {"mosaic": {"_target_": "dino.data.mixing.Mosaic", "probability": 1.0, "side": 32}}
    parts["mixup"] = {"_target_": "dino.data.mixing.MixUp", "probability": 0.5}
    cfg.dataloader.train.mapper.update(_target_="dino.d2.combining_mapper.CombiningMapper", **parts)
    cfg.dataloader.train.mapper.update(begin=0.5, end=1.0, max_iter="${train.max_iter}")


def test_combined_images_have_a_picture_of_their_own(tmp_path):
    """The part of the training in which they are shown needs its length, which follows from the epochs."""
    train(tmp_path, "train.max_iter=null", "train.epochs=1", "train.eval_period=0", counts=(1, 1, 1, 1), change=combine)
    names = {path.name for path in (tmp_path / "run").glob("train_batch*.png")}
    assert names == {"train_batch.png", "train_batch_combined.png"}
    assert [iteration for iteration, _ in losses(tmp_path)] == [0, 1]


def test_bfloat16_and_checkpointed_activations(tmp_path):
    low = ("train.amp.enabled=True", "train.amp.evaluation=True", "train.max_iter=1", "train.eval_period=0")
    train(tmp_path, *low, "train.activation_checkpointing=[encoder,decoder]")
    assert read_plain(tmp_path / "run/model_final.pth")["model"]["network.level_embed"].dtype == torch.float32


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite(tmp_path, monkeypatch, skip):
    compute = RecipeStep.compute_losses

    def spoil(step, part, options):
        found = compute(step, part, options)
        return {name: x * float("nan") for name, x in found.items()} if step.iter == 1 else found

    monkeypatch.setattr(RecipeStep, "compute_losses", spoil)
    options = ("train.max_iter=3", "train.eval_period=0", f"train.skip_non_finite={skip}")
    if skip:
        train(tmp_path, *options)
        assert read_plain(tmp_path / "run/model_final.pth")["trainer"]["skipped"] == 1
        assert [iteration for iteration, _ in losses(tmp_path)] == [0, 2]
    else:
        with pytest.raises(FloatingPointError, match=r"iteration 1: losses .*Images: .*image_\d\.png"):
            train(tmp_path, *options)
        assert not (tmp_path / "run/model_final.pth").exists()
    (entry, *_) = read_plain(tmp_path / "run/non_finite_batch_1.pth")
    assert entry["image"].dtype == torch.uint8
    assert entry["boxes"].shape == (len(entry["labels"]), 4)


def measured(values):
    """An `evaluate` that returns these APs of raw and averaged weights, one pair after another."""
    left = iter(values)

    def evaluate(*_):
        raw, averaged = next(left)
        return {"bbox": {"AP": raw, "AP50": raw}, "ema": {"bbox": {"AP": averaged, "AP50": averaged}}}

    return evaluate


def test_early_stopping_and_the_best_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_training, "evaluate", measured([(1.0, 2.0), (1.5, 3.0), (2.0, 2.0), (2.0, 2.0)]))
    train(tmp_path, "train.max_iter=9", "train.eval_period=1", "train.ema.enabled=True", "train.best.patience=2")
    record = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert [entry["iteration"] for entry in record] == [1, 2, 3, 4]
    best = read_plain(tmp_path / "run/model_best.pth")
    assert (best["weights"], best["value"], best["iteration"]) == ("averaged", 3.0, 1)
    assert not (tmp_path / "run/model_final.pth").exists()


def test_data_without_objects(tmp_path, caplog):
    with pytest.raises(DataError, match=r"nothing to learn: .* has no objects"):
        train(tmp_path / "none", counts=(0, 0))
    assert not list((tmp_path / "none/run").iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.float32_precision=tf32", "train.float32_precision"),
        ("train.best.mode=best", "train.best.mode='best': write max or min"),
        ("train.parallel=fsdp", "train.parallel=fsdp needs Detectron2"),
        ("train.activation_checkpointing=[neck]", "train.activation_checkpointing: .*unknown"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, override)


def test_predictor(unbroken):
    """`TinyBackbone` is no part that a checkpoint may name; the rest of the description is read."""
    with pytest.raises(DataError, match=r"tests\.tiny\.TinyBackbone.* is not on the list"):
        Predictor.from_checkpoint(unbroken[0] / "run/model_final.pth")


def test_checkpoints_keep_the_ids_of_the_training_data(tmp_path):
    """Validation data may number the same classes otherwise."""
    train = write_coco(tmp_path / "train", category_ids=(7, 40, 900))
    val = write_coco(tmp_path / "val", category_ids=(1, 2, 3))
    given = [*SHRINK, f"train.output_dir={tmp_path / 'run'}", "train.max_iter=1", "train.eval_period=0"]
    recipe_training.train(shrink(complete(read_recipe(str(SMALL)), given, DataFiles(*train, *val))), resume=False)
    assert torch.load(tmp_path / "run/model_final.pth")["category_ids"] == [7, 40, 900]
