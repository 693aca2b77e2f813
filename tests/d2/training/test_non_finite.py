"""A loss or gradient that is not finite never reaches the weights."""

from functools import partial

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from dino.d2.training.trainer import Trainer
from dino.training import non_finite

from ..tiny import random_input, tiny_detector

INPUTS = [random_input("a.png"), random_input("b.png")]


class Faulty(nn.Module):
    """Its loss, or its gradient alone, is not finite in the iterations of `bad`."""

    def __init__(self, kind, bad):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)
        self.kind, self.bad, self.calls = kind, bad, 0

    def forward(self, _):
        self.calls += 1
        bad = self.calls - 1 in self.bad
        x = torch.randn(4, 3)
        if bad and self.kind == "input":
            x = x * float("nan")
        loss = self.linear(self.norm(x)).square().mean()
        if bad and self.kind == "loss":
            loss = loss * float("inf")
        if bad and self.kind == "gradient":
            loss = loss + (self.linear.weight.sum() * 0).sqrt()  # finite, with an infinite slope
        return {"loss_ce": loss}


def run(folder, model, iterations=4, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=options.pop("fused", True))
    trainer = Trainer(model, [INPUTS] * 50, optimizer, output_dir=str(folder), log_period=100, **options)
    seen = []
    with EventStorage() as trainer.storage:
        trainer.max_iter = 1000
        for trainer.iter in range(iterations):
            trainer.run_step()
            seen.append({key: value.clone() for key, value in model.state_dict().items()})
    return trainer, seen


def assert_unchanged(before, after):
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_stops_before_the_weights_change_whatever_is_logged(tmp_path, kind, fused):
    model = Faulty(kind, bad={2})
    before = []
    model.register_forward_pre_hook(lambda *_: before.append({k: v.clone() for k, v in model.state_dict().items()}))
    with pytest.raises(FloatingPointError, match=r"iteration 2: .*Images: a\.png, b\.png") as caught:
        run(tmp_path, model, fused=fused)
    assert ("gradients are NaN or infinite" if kind == "gradient" else "'loss_ce': ") in str(caught.value)
    assert (tmp_path / "non_finite_batch_2.pth").is_file()
    assert_unchanged(before[-1], model.state_dict())  # the running statistics of the norm, too
    assert len(before) == 3


@pytest.mark.parametrize(
    ("value", "scaled", "cause"),
    [
        (None, False, "Likely cause: the learning rate is too high. Lower optimizer.lr, or look at the boxes"),
        (None, True, "Likely cause: float16 overflows. Use train.amp.dtype=bfloat16, or lower optimizer.lr"),
        ("image", False, "Likely cause: pixels or boxes of b.png, not finite or without size. Fix its input"),
        ("boxes", True, "Likely cause: pixels or boxes of b.png, not finite or without size. Fix its input"),
        ("size", False, "Likely cause: pixels or boxes of b.png, not finite or without size. Fix its input"),
    ],
)
def test_the_likely_cause_is_named(value, scaled, cause):
    boxes = torch.tensor([[0.0, 0, 4, 4]])
    batch = [{"file_name": name, "image": torch.ones(3, 8, 8), "boxes": boxes.clone()} for name in ("a.png", "b.png")]
    if value == "size":
        batch[1]["boxes"][0, 2] = 0
    elif value:
        batch[1][value][0, 0] = float("nan")
    assert non_finite._likely_cause(batch, scaled=scaled).startswith(cause)


@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_skips_and_counts_by_a_switch(tmp_path, kind, caplog):
    trainer, seen = run(tmp_path, Faulty(kind, bad={1, 3}), iterations=5, skip_non_finite=True)
    assert trainer.checker.skipped == 2
    assert trainer.state_dict()["skipped"] == 2
    for bad in (1, 3):
        assert_unchanged(seen[bad - 1], seen[bad])
    assert not torch.equal(seen[1]["linear.weight"], seen[2]["linear.weight"])
    assert "The weights are unchanged; 2 such steps so far" in caplog.text
    assert len(list(tmp_path.glob("non_finite_batch_*.pth"))) == 2


def test_skipping_has_an_end(tmp_path):
    with pytest.raises(FloatingPointError, match=f"iteration {non_finite._LONGEST_STREAK - 1}:"):
        run(tmp_path, Faulty("loss", bad=set(range(100))), iterations=40, skip_non_finite=True)


def test_a_loss_scale_that_is_too_large_is_halved_without_a_word(tmp_path, caplog):
    trainer, seen = run(tmp_path, Faulty("gradient", bad={0, 1}), iterations=3, dtype="float16")
    assert trainer.scaler.get_scale() == 2.0**14
    assert_unchanged({k: v for k, v in seen[0].items() if "linear" in k}, seen[1])
    assert caplog.text == ""


def test_nan_predictions_of_one_image_are_skipped(tmp_path):
    model = tiny_detector()
    bad = {**INPUTS[1], "image": torch.full((3, 64, 80), float("nan"))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    trainer = Trainer(model, [[INPUTS[0], bad]], optimizer, output_dir=str(tmp_path), skip_non_finite=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with EventStorage() as trainer.storage:
        trainer.run_step()
    assert trainer.checker.skipped == 1
    assert_unchanged(before, model.state_dict())


def test_the_host_learns_of_it_after_the_next_transfer(tmp_path):
    """As on a GPU: nothing is read before the next forward pass has waited for the device."""
    model = Faulty("loss", bad={0})
    describe = partial(Trainer.describe, None)
    watch = non_finite.NonFiniteChecker(model, str(tmp_path), describe, skip=False, scaled=False)
    watch.begin()
    norm, usable = watch.judge(0, INPUTS, {"loss_ce": torch.tensor(float("nan"))}, torch.tensor(1.0), stop=False)
    assert norm.isnan()
    assert not usable
    assert not list(tmp_path.iterdir())
    assert watch.pending.batch is INPUTS  # kept until then
    with pytest.raises(FloatingPointError, match=r"iteration 0: losses \{.loss_ce.: nan\}"):
        watch.check()
    watch.check()  # only once
