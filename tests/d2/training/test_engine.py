import json
import logging
import os
import pickle
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from dino.d2.checkpoint import Checkpointer
from dino.d2.data_loading import dataset, load_dataset
from dino.d2.training import engine
from dino.layers.cpu_feed_forward import CpuFeedForward
from dino.layers.feed_forward import FeedForward
from dino.training.progress import Progress
from dino.utils.files import DataError, UserError

from ...coco_files import write_coco
from ..recipes import tiny_recipe
from ..tiny import random_input, tiny_detector

NAMES = ["red", "green", "blue"]


class Malicious:
    """Leaves a file behind when it is unpickled the ordinary way."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def read_plain(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def run_folder(cfg):
    return Path(cfg.train.output_dir)


def metrics_of(cfg):
    lines = (run_folder(cfg) / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def small_trainer(folder, dtype="float32", inputs=None, model=None):
    model = model or tiny_detector()
    inputs = inputs or [random_input("a.png"), random_input("b.png", 0, height=48)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return engine.Trainer(model, [inputs] * 3, optimizer, dtype=dtype, clip_norm=0.1, output_dir=str(folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two iterations with one evaluation at its end: its recipe and its metrics."""
    torch.manual_seed(0)
    cfg = tiny_recipe(tmp_path_factory.mktemp("trained"))
    return cfg, engine.train(cfg, resume=False)


def test_training_leaves_all_its_files(trained):
    cfg, results = trained
    assert cfg.train.max_iter == 2
    assert 0 <= results["bbox"]["AP"] <= 100
    assert {"AP50", "AP-red", "AP-green", "AP-blue"} <= set(results["bbox"])
    written = {str(path.relative_to(run_folder(cfg))) for path in run_folder(cfg).rglob("*") if path.is_file()}
    expected = {"config.yaml", "last_checkpoint", "metrics.json", "model_final.pth"}
    assert expected | {"inference/coco_instances_results.json"} <= written
    assert not [name for name in written if name.endswith((".part", ".yaml.pkl"))]


def test_metrics_hold_every_loss(trained):
    lines = metrics_of(trained[0])
    losses = {key for key in lines[0] if key.startswith("loss_")}
    assert len(losses) == 3 * 5  # ce, bbox, giou; two layers, proposals, denoising of two layers
    assert {"total_loss", "lr", "data_time"} <= set(lines[0])
    assert lines[0]["lr"] == pytest.approx(2e-4)
    assert any("bbox/AP" in line for line in lines)


def test_the_checkpoint_is_plain_data_with_the_names(trained):
    content = read_plain(run_folder(trained[0]) / "model_final.pth")
    assert content["names"] == NAMES
    assert content["category_ids"] == [1, 2, 3]
    assert content["iteration"] == 1
    assert set(content) >= {"model", "trainer"}
    assert content["model"].keys() == instantiate(trained[0].model).state_dict().keys()


def test_weights_changed(trained):
    cfg, _ = trained
    torch.manual_seed(0)
    fresh = instantiate(cfg.model).state_dict()
    content = read_plain(run_folder(cfg) / "model_final.pth")["model"]
    assert any(not torch.equal(content[key], fresh[key]) for key in fresh if "decoder" in key)


def test_the_saved_recipe_evaluates_the_checkpoint(trained):
    cfg, results = trained
    again = cfg.copy()
    again.train.init_checkpoint = str(run_folder(cfg) / "model_final.pth")
    found = engine.evaluate_checkpoint(again)
    assert found["bbox"]["AP"] == pytest.approx(results["bbox"]["AP"], nan_ok=True)


def test_a_model_on_a_cpu_has_the_feed_forward_network_for_it(tmp_path):
    kinds = {type(module) for module in engine._build_model(tiny_recipe(tmp_path)).modules()}
    assert CpuFeedForward in kinds
    assert FeedForward not in kinds


def test_training_with_batches_without_any_object(tmp_path):
    batch = "dataloader.train.total_batch_size=1"
    cfg = tiny_recipe(tmp_path, batch, "train.max_iter=3", "train.eval_period=0", counts=(0, 0, 1))
    engine.train(cfg, resume=False)
    assert (run_folder(cfg) / "model_final.pth").is_file()
    assert {line["loss_bbox"] == 0 for line in metrics_of(cfg) if "loss_bbox" in line} == {True, False}


def test_an_ap_of_zero_is_warned_of(tmp_path, caplog, monkeypatch):
    cfg = tiny_recipe(tmp_path, "train.max_iter=4", "train.eval_period=1")
    monkeypatch.setattr(engine, "_evaluate", lambda *_: {"bbox": {"AP": 0.05, "AP50": 0.09}})
    engine.train(cfg, resume=False)
    lines = [record.message for record in caplog.records if record.message.startswith("AP and AP50 are 0")]
    assert [line.partition(". ")[0] for line in lines] == [
        f"AP and AP50 are 0 after {completed} of 4 iterations" for completed in (2, 3, 4)
    ]
    losses = [line["total_loss"] for line in metrics_of(cfg) if "total_loss" in line]
    assert f"{losses[0]:.3g} at the start, {losses[-1]:.3g} now" in lines[-1] or f"to {losses[-1]:.3g}" in lines[-1]


def test_a_loss_that_rises_is_warned_of(tmp_path, caplog):
    trainer, progress = small_trainer(tmp_path), Progress(9, {}, "optimizer.lr", 0.5)
    with EventStorage() as trainer.storage:
        for trainer.iter, loss in ((0, 5.0), (1, None), (2, 8.0)):
            if loss:
                trainer.storage.put_scalar("total_loss", loss, cur_iter=trainer.iter)
            assert not caplog.records
            engine._watch_loss(progress, trainer)
    assert progress.losses == {0: 5.0, 2: 8.0}
    (record,) = caplog.records
    assert record.message.startswith(
        "the total loss rises: 5 at the start, 8 after 3 of 9 iterations. The learning rate"
    )


def test_the_first_loss_is_known_after_a_resume(tmp_path):
    cfg = tiny_recipe(tmp_path)
    lines = [{"iteration": n, "total_loss": 5.0 + n} for n in range(4)]
    (run_folder(cfg) / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = engine._start_progress(cfg, small_trainer(tmp_path), 3, ["a doubt"])
    assert progress.losses == {0: 5.0, 1: 6.0, 2: 7.0}
    assert (progress.lr, progress.doubts) == (1e-3, ["a doubt"])


@pytest.mark.parametrize("best", ["raw", "averaged"])
def test_ap_of_averaged_weights_counts(caplog, best):
    progress = Progress(10, {}, "optimizer.lr", 0.1)
    zero, good = ({"bbox": {"AP": x, "AP50": x}} for x in (0.0, 3.0))
    results = {**good, "ema": zero} if best == "raw" else {**zero, "ema": good}
    engine._watch_ap(progress, 10, results)
    engine._watch_ap(progress, 10, {})
    engine._watch_ap(progress, 10, {"bbox": {"AP": float("nan"), "AP50": float("nan")}})
    engine._watch_ap(progress, 2, zero)
    assert not caplog.records
    engine._watch_ap(progress, 10, {**zero, "ema": zero})
    assert "AP and AP50 are 0 after 10 of 10 iterations" in caplog.text


def test_resume_continues_where_the_run_ended(tmp_path, caplog):
    cfg = tiny_recipe(tmp_path, "train.max_iter=2", "train.eval_period=0")
    engine.train(cfg, resume=False)
    load_dataset.cache_clear()
    cfg.train.max_iter = 5
    done = []
    step = engine.Trainer.run_step

    class Watched(engine.Trainer):
        def run_step(self):
            done.append((self.iter, len(self.optimizer.state), self.optimizer.param_groups[0]["lr"]))
            step(self)

    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Trainer", Watched)
        engine.train(cfg, resume=True)
    assert [iteration for iteration, *_ in done] == [2, 3, 4]
    assert done[0][1] > 0  # AdamW's moments came back
    assert [lr for *_, lr in done] == pytest.approx([2e-4, 2e-4, 2e-5])  # it falls for the last fifth of all five
    assert "nothing to resume" not in caplog.text
    assert read_plain(run_folder(cfg) / "model_final.pth")["iteration"] == 4


def test_resume_with_nothing_to_resume_says_so(tmp_path, caplog):
    cfg = tiny_recipe(tmp_path, "train.max_iter=1", "train.eval_period=0")
    with caplog.at_level(logging.INFO, "detectron2.dino"):
        engine.train(cfg, resume=True)
    assert "nothing to resume in" in caplog.text


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")  # the first loss scale of float16 is too large by design
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_through_the_recipe(tmp_path, dtype):
    overrides = ["train.amp.enabled=True", f"train.amp.dtype={dtype}", "train.max_iter=2", "train.eval_period=0"]
    cfg = tiny_recipe(tmp_path, *overrides)
    engine.train(cfg, resume=False)
    state = read_plain(run_folder(cfg) / "model_final.pth")["trainer"]["scaler"]
    assert bool(state) == (dtype == "float16")
    losses = [line["total_loss"] for line in metrics_of(cfg) if "total_loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 1000 for loss in losses)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_forward_pass_is_under_autocast(tmp_path, dtype, expected):
    trainer = small_trainer(tmp_path, dtype)
    seen = set()
    trainer.model.network.decoder.layers[0].feed_forward.linear1.register_forward_hook(
        lambda *call: seen.add(call[2].dtype)
    )
    with EventStorage() as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    assert seen == {expected}


@pytest.mark.parametrize(("switch", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_evaluation_in_the_same_precision_by_a_switch(tmp_path, switch, expected):
    cfg = tiny_recipe(tmp_path, "train.amp.enabled=True", f"train.amp.evaluation={switch}")
    model = instantiate(cfg.model).eval()
    seen = set()
    model.network.decoder.layers[0].feed_forward.linear1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    assert "AP" in engine._evaluate(cfg, model)["bbox"]
    assert seen == {expected}


def test_the_deterministic_switch(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **options: asked.append((args, options)))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cfg = tiny_recipe(tmp_path, "train.seed=-1")
    engine._use_determinism(cfg)
    assert asked == []
    assert cfg.train.seed >= 0  # drawn, and from now on known
    cfg.train.deterministic = True
    engine._use_determinism(cfg)
    assert asked == [((True,), {"warn_only": True})]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_gradients_are_clipped(tmp_path):
    trainer = small_trainer(tmp_path)
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, *args, **kwargs):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer.optimizer = Watched(trainer.model.parameters(), lr=1e-3)
    with EventStorage() as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    assert norms == [pytest.approx(0.1, rel=1e-3)]


def assert_stopped(folder, inputs, trainer, reason):
    trainer.iter = 5
    with EventStorage(5) as trainer.storage, pytest.raises(FloatingPointError) as caught:
        trainer.run_step()
    message = str(caught.value)
    path = folder / "non_finite_batch_5.pth"
    assert message.startswith("iteration 5: ")
    assert reason in message
    assert "Images: a.png, b.png" in message
    assert str(path) in message
    saved = read_plain(path)
    assert [x["file_name"] for x in saved] == ["a.png", "b.png"]
    for kept, given in zip(saved, inputs, strict=True):
        torch.testing.assert_close(kept["image"], given["image"], equal_nan=True)
        assert torch.equal(kept["boxes"], given["instances"].gt_boxes.tensor)
        assert torch.equal(kept["labels"], given["instances"].gt_classes)


def test_non_finite_predictions_stop_the_training(tmp_path):
    inputs = [random_input("a.png"), random_input("b.png")]
    inputs[1]["image"] = torch.full((3, 64, 80), float("nan"))
    trainer = small_trainer(tmp_path, inputs=inputs)
    assert_stopped(tmp_path, inputs, trainer, "non-finite predictions for b.png")


def test_non_finite_losses_stop_the_training_before_the_step(tmp_path):
    class Endless(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, _):
            return {"loss_ce": self.weight.sum(), "loss_bbox": self.weight.sum() * float("inf")}

    inputs = [random_input("a.png"), random_input("b.png")]
    trainer = small_trainer(tmp_path, inputs=inputs, model=Endless())
    assert_stopped(tmp_path, inputs, trainer, "'loss_bbox': inf")
    assert trainer.model.weight.item() == 1


def test_faults_are_told_without_a_traceback(caplog):
    """Detectron2 logs a traceback for whatever ends a training; a fault of the data gets one line from the program."""

    class Failing(SimpleTrainer):
        def __init__(self, error):
            super().__init__(nn.Linear(1, 1), [1], None)
            self.error = error

        def run_step(self):
            raise self.error

    for error, logged in ((DataError("bad.png"), False), (FloatingPointError("nan"), False), (KeyError("bug"), True)):
        caplog.clear()
        with caplog.at_level(logging.ERROR), pytest.raises(type(error)):
            Failing(error).train(0, 1)
        assert ("Exception during training" in caplog.text) == logged


# Checkpoints


def save(folder, name="model", names=NAMES, **options):
    model = tiny_detector(**options)
    Checkpointer(model, str(folder), names=names).save(name, iteration=7)
    return model, folder / f"{name}.pth"


def test_checkpoints_come_back(tmp_path, caplog):
    model, path = save(tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"
    other = tiny_detector()
    checkpointer = Checkpointer(other, names=NAMES)
    assert checkpointer.load(str(path))["iteration"] == 7
    assert checkpointer.problems == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "was trained for the classes" not in caplog.text


def test_other_names_are_told(tmp_path, caplog):
    _, path = save(tmp_path, names=["cat", "dog", "cow"])
    Checkpointer(tiny_detector(), names=NAMES).load(str(path))
    assert "was trained for the classes ['cat', 'dog', 'cow'], the data has ['red', 'green', 'blue']" in caplog.text


def test_the_same_names_in_another_order_are_put_right(tmp_path, caplog):
    model, path = save(tmp_path, names=["blue", "red", "green"])
    other = tiny_detector()
    Checkpointer(other, names=NAMES).load(str(path))
    heads = [x.network.decoder.class_heads[0].weight for x in (model, other)]
    assert torch.equal(heads[0][[1, 2, 0]], heads[1])
    assert "was trained for the classes" not in caplog.text


def test_no_folder_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpointer(tiny_detector(), names=NAMES).save("model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, broken):
    _, path = save(tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(UserError, match=r"can't write .*model\.pth: no space left on device"):
        save(tmp_path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"model.pth", "last_checkpoint"}


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "list": lambda path: torch.save([1, 2], path),
    "nested": lambda path: torch.save({"state_dict": {"weight": torch.ones(1)}}, path),
    "number": lambda path: torch.save({"model": 3}, path),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_named(tmp_path, damage):
    _, path = save(tmp_path)
    damage(path)
    checkpointer = Checkpointer(tiny_detector(), names=NAMES)
    with pytest.raises(DataError, match=r"can't (use|read) the (checkpoint|weights) .*model\.pth"):
        checkpointer.load(str(path))
    _, good = save(tmp_path / "..", name=f"{tmp_path.name}_good")
    checkpointer.load(str(good))  # the object is still of use


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(DataError, match=r"weights not found: .*absent\.pth"):
        Checkpointer(tiny_detector(), names=NAMES).load(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth", ".bin"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, suffix):
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    content = {"model": Malicious(trace), "model_state": Malicious(trace)}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=rf"evil\{suffix}"):
        Checkpointer(tiny_detector(), names=NAMES).load(str(path))
    assert not trace.exists()


def test_weights_of_detectron2_in_a_pickle(tmp_path):
    """The form of Detectron2's ImageNet weights: numpy arrays under the backbone's names."""
    model = tiny_detector()
    arrays = {key: 7 + torch.zeros_like(x).numpy() for key, x in model.network.neck.backbone.state_dict().items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}))
    Checkpointer(model, names=NAMES).load(str(path))
    assert (model.network.neck.backbone.res3.weight == 7).all()


def evaluate_file(cfg, path):
    cfg = cfg.copy()
    cfg.train.init_checkpoint = str(path)
    return engine.evaluate_checkpoint(cfg)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_evaluation_refuses_weights_that_do_not_fit(trained, tmp_path, change):
    cfg, _ = trained
    content = read_plain(run_folder(cfg) / "model_final.pth")
    weights = content["model"]
    key = "network.decoder.class_heads.1.bias"
    if change == "missing":
        del weights[key]
    else:
        weights[key] = torch.zeros(91)
    torch.save(content, tmp_path / "other.pth")
    message = {"missing": "does not fit the recipe: 1 tensors", "shape": "the file is of another model"}[change]
    with pytest.raises(DataError, match=rf"other\.pth:? {message}") as caught:
        evaluate_file(cfg, tmp_path / "other.pth")
    assert key.removeprefix("network.") in str(caught.value)


@pytest.mark.parametrize("names", [{}, {"names": NAMES}])
def test_weights_of_another_model_are_refused(trained, tmp_path, names):
    """In a training, too, which would otherwise go on from random weights."""
    cfg = trained[0].copy()
    path = tmp_path / "other.pth"
    torch.save({"model": nn.Linear(2, 2).state_dict(), **names}, path)
    with pytest.raises(DataError, match=r"other\.pth: the file is no DINO in a known format"):
        evaluate_file(cfg, path)
    cfg.train.init_checkpoint, cfg.train.output_dir = str(path), str(tmp_path)
    with pytest.raises(DataError, match=r"other\.pth: the file is no DINO in a known format"):
        engine.train(cfg, resume=False)


def test_weights_for_other_classes_are_a_start(tmp_path):
    """All tensors but those that have a row for each class are taken over; those begin afresh, with their prior."""
    pretrained, path = save(tmp_path, num_classes=80)
    torch.manual_seed(5)
    model = tiny_detector(num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checkpointer = Checkpointer(model, names=NAMES)
    checkpointer.load(str(path))
    fresh = {problem.split()[0] for problem in checkpointer.problems}
    heads = ("decoder.class_heads.0", "decoder.class_heads.1", "query_selection.class_head")
    expected = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert fresh == expected | {"denoising.label_embed.weight"}
    for key, value in model.network.state_dict().items():
        key_there = f"network.{key}"
        assert torch.equal(value, before[key_there] if key in fresh else pretrained.state_dict()[key_there]), key


def test_evaluation_refuses_a_truncated_file(trained, tmp_path):
    cfg, _ = trained
    content = (run_folder(cfg) / "model_final.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"half\.pth"):
        evaluate_file(cfg, tmp_path / "half.pth")


def test_a_model_that_its_parts_refuse_is_told_in_one_sentence(tmp_path):
    cfg = tiny_recipe(tmp_path)
    cfg.model.network.neck.num_levels = 1
    with pytest.raises(DataError, match="the recipe's model can't be built: num_levels 1"):
        engine._build_model(cfg)


@pytest.mark.parametrize("ids", [(7, 40, 900), (0, 1, 2)])
def test_category_ids_of_the_data(tmp_path, ids):
    cfg = tiny_recipe(tmp_path)
    cfg.dataloader.train.dataset.name = f"ids_{ids[0]}"
    files = write_coco(tmp_path / "ids", category_ids=ids)
    cfg.dataloader.train.dataset.update(annotations=files.annotations, images=files.images)
    assert engine._category_ids_of(cfg.dataloader.train.dataset) == list(ids)


def test_a_data_set_without_category_ids(tmp_path):
    cfg = tiny_recipe(tmp_path)
    DatasetCatalog.register("no_ids", list)
    MetadataCatalog.get("no_ids").thing_classes = ["a", "b"]
    cfg.dataloader.train.dataset = L(dataset)(name="no_ids")
    assert engine._category_ids_of(cfg.dataloader.train.dataset) == [1, 2]
