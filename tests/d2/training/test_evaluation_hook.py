"""The record of the evaluations, best weights, early stopping; with a toy model and made-up results."""

import json
import random

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventWriter
from torch import nn

from dino.d2.checkpoint import Checkpointer
from dino.d2.training.evaluation_hook import Evaluation
from dino.d2.training.hooks import AverageWeights, Checkpoints
from dino.d2.training.trainer import EndOfTraining
from dino.training.ema import Ema
from dino.training.evaluation_record import _read
from dino.utils.files import DataError


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, _):
        return {"loss": self.weight.sum()}


def run(folder, values, averaged=None, start=0, iterations=None, period=1, **options):
    """Train as many iterations as there are values, each the AP of one evaluation."""
    model = Toy()
    checkpointer = Checkpointer(model, str(folder), names=["cat"])
    trainer = SimpleTrainer(model, [[None]] * 100, torch.optim.SGD(model.parameters(), lr=0.1))
    ema = Ema(model, 0.5) if averaged else None
    results = iter(zip(values, averaged or values, strict=True))

    def evaluate():
        raw, mean = next(results)
        return {"bbox": {"AP": raw}, **({"ema": {"bbox": {"AP": mean}}} if ema else {})}

    checkpointer.add_checkpointable("trainer", trainer)
    hooks = [AverageWeights(ema)] if ema else []
    hooks += [Checkpoints(checkpointer, 2, 2), Evaluation(period, evaluate, checkpointer, ema, **options)]
    trainer.register_hooks(hooks)
    trainer.train(start, iterations or start + len(values))
    return model


def best(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)


def record(folder):
    return [(entry["iteration"], entry["bbox/AP"]) for entry in json.loads((folder / "evaluations.json").read_text())]


def test_the_best_weights_are_kept_and_never_taken_for_the_last(tmp_path):
    model = run(tmp_path, [1.0, 3.0, 2.0, float("nan")])
    assert record(tmp_path) == [(1, 1.0), (2, 3.0), (3, 2.0), (4, None)]
    content = best(tmp_path)
    assert {key: content[key] for key in ("metric", "value", "iteration", "weights", "names")} == {
        "metric": "bbox/AP",
        "value": 3.0,
        "iteration": 1,
        "weights": "raw",
        "names": ["cat"],
    }
    assert "trainer" not in content
    assert content["model"]["weight"].item() == pytest.approx(1 - 2 * 0.1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert Checkpointer(model, str(tmp_path), names=["cat"]).last_whole() == str(tmp_path / "model_final.pth")


def test_averaged_weights_can_be_the_best(tmp_path):
    model = run(tmp_path, [1.0, 2.0], averaged=[4.0, 3.0])
    content = best(tmp_path)
    assert (content["weights"], content["value"], content["iteration"]) == ("averaged", 4.0, 0)
    assert content["model"]["weight"].item() == pytest.approx(1 - 0.1 * (1 - 2 / 11), abs=1e-4)
    assert model.weight.item() == pytest.approx(0.8)  # the training goes on with its own


def test_less_can_be_better(tmp_path):
    run(tmp_path, [3.0, 1.0, 2.0], mode="min")
    assert best(tmp_path)["value"] == 1.0


def test_the_best_value_outlives_the_run(tmp_path):
    run(tmp_path, [1.0, 3.0])
    run(tmp_path, [2.0, 2.5], start=2)
    assert best(tmp_path)["value"] == 3.0
    assert record(tmp_path) == [(1, 1.0), (2, 3.0), (3, 2.0), (4, 2.5)]


def test_evaluations_after_the_checkpoint_are_made_again(tmp_path):
    run(tmp_path, [1.0, 2.0, 9.0])
    run(tmp_path, [4.0, 3.0], start=2)
    assert record(tmp_path) == [(1, 1.0), (2, 2.0), (3, 4.0), (4, 3.0)]


def test_an_interrupted_evaluation_is_made_up_for(tmp_path):
    run(tmp_path, [1.0, 2.0])
    (tmp_path / "evaluations.json").write_text('[{"iteration": 1, "bbox/AP": 1.0}]')
    run(tmp_path, [2.0, 3.0], start=2, iterations=3)
    assert record(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_early_stopping(tmp_path):
    with pytest.raises(EndOfTraining):
        run(tmp_path, [1.0, 3.0, 2.0, 2.0, 5.0], patience=2)
    assert [iteration for iteration, _ in record(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "train.best.mode='best': write max or min"),
        ({"patience": 2, "period": 0}, "train.best.patience counts evaluations"),
        ({"metric": "bbox/mAP"}, "train.best.metric='bbox/mAP' was not measured; there are bbox/AP"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, [1.0], **options)


def test_a_damaged_record_is_named(tmp_path):
    run(tmp_path, [1.0, 2.0])
    (tmp_path / "evaluations.json").write_text('[{"iter')
    with pytest.raises(DataError, match=r"evaluations\.json is damaged"):
        run(tmp_path, [1.0], start=2)


DAMAGED = [
    *(
        b"",
        b"5",
        b"null",
        b"{}",
        b'{"iteration": 1}',
        b"[5]",
        b"[[]]",
        b'["iteration"]',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ),
    *(
        b'[{"bbox/AP": 1.0}]',
        b'[{"iteration": "1"}]',
        b'[{"iteration": 1, "bbox/AP": "high"}]',
        b'[{"iteration": null}]',
    ),
    *(b'[{"iteration": 1, "bbox/AP": NaN}]', b'[{"iteration": 1, "bbox/AP": [1]}]', b'[{"iteration": 1.5}]'),
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:30]))
def test_damaged_records_of_any_kind_are_named(tmp_path, content):
    (tmp_path / "evaluations.json").write_bytes(content)
    with pytest.raises(DataError, match=r"evaluations\.json is damaged: .*Remove the file to continue without"):
        run(tmp_path, [1.0], start=2)


def test_damaged_records_of_any_bytes(tmp_path):
    path, draw = tmp_path / "evaluations.json", random.Random(0)
    whole = json.dumps([{"iteration": n, "bbox/AP": 1.5, "ema/bbox/AP": None} for n in range(1, 4)]).encode()
    for _ in range(500):
        content = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(4)):
            place = draw.randrange(len(whole))
            content[place : place + 1] = [draw.choice(b'{}[]",:0123456789.eE-+ \x00\xff')]
        path.write_bytes(content)
        try:
            record = _read(path)
        except DataError as error:
            assert "evaluations.json is damaged" in str(error)  # noqa: PT017
        else:
            assert all(type(entry["iteration"]) is int for entry in record)


# Checkpoints


def test_the_newest_are_kept_over_resumed_runs(tmp_path):
    run(tmp_path, [1.0] * 6)
    (tmp_path / "model_0000005.pth.part").write_bytes(b"half")
    run(tmp_path, [1.0] * 2, start=6)
    assert sorted(p.name for p in tmp_path.glob("model_0*")) == ["model_0000005.pth", "model_0000007.pth"]


def test_numbers_are_written_before_the_checkpoint(tmp_path):
    """Else a kill between the two leaves a gap: the resumed run starts behind the iteration."""
    order = []
    writer, checkpointer = EventWriter(), Checkpointer(Toy(), str(tmp_path), names=["cat"])
    writer.write = lambda: order.append("numbers")
    checkpointer.write = lambda *_: order.append("checkpoint")
    trainer = SimpleTrainer(checkpointer.model, [[None]] * 2, torch.optim.SGD(checkpointer.model.parameters(), lr=0.1))
    trainer.register_hooks([Checkpoints(checkpointer, 1, writers=[writer])])
    trainer.train(0, 1)
    assert order == ["numbers", "checkpoint"] * 2  # of the iteration, and the final one


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(tmp_path, caplog, damage):
    model = run(tmp_path, [1.0] * 4)
    path = tmp_path / "model_final.pth"
    content = bytearray(path.read_bytes())
    if damage == "altered":
        place = content.index(model.weight.detach().numpy().tobytes())
        content[place] ^= 255
    path.write_bytes(content if damage == "altered" else content[: len(content) // 2] if damage == "cut" else b"")
    found = Checkpointer(model, str(tmp_path), names=["cat"]).last_whole()
    assert found == str(tmp_path / "model_0000003.pth")
    assert f"{path} {'was altered' if damage == 'altered' else 'is cut short'}" in caplog.text
    assert "the run continues from" in caplog.text
    if damage == "altered":
        with pytest.raises(DataError, match="was altered since it was written"):
            Checkpointer(model, names=["cat"]).load(str(path))


def test_nothing_whole_to_continue_with(tmp_path):
    model = run(tmp_path, [1.0] * 2)
    for path in tmp_path.glob("model_*.pth"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"nothing to continue with: .*Start in another train\.output_dir"):
        Checkpointer(model, str(tmp_path), names=["cat"]).last_whole()
