"""One step, and what it waits for."""

import logging
import resource
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from dino.d2 import DINODetector
from dino.d2.training.trainer import EndOfTraining, Trainer
from dino.layers.matching_metrics import MatchingMetrics
from dino.utils.files import Stopped, UserError
from dino.utils.run_folder import note_start

from ..recipes import parse, recipe
from ..tiny import random_input, tiny_detector

BATCH = [random_input("a.png"), random_input("b.png", 0, height=48)]


def make(folder, model=None, lr=1e-3, **options):
    model = model or tiny_detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    return Trainer(model, [BATCH] * 1000, optimizer, output_dir=str(folder), **options)


def run(trainer, start, stop):
    with EventStorage(start) as trainer.storage:
        for trainer.iter in range(start, stop):
            trainer.run_step()
        return {name: history.values() for name, history in trainer.storage.histories().items()}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_trainer_reads_nothing_back_in_an_iteration_that_does_not_log(tmp_path, dtype):
    """As on a GPU: between the end of the forward pass and the next one."""
    trainer = make(tmp_path, dtype=dtype, log_period=3)
    trainer.waits = False
    found = []

    def update(losses, update=trainer.update):
        with Waits() as waits:
            update(losses)
        found.append(waits.found)

    trainer.update = update
    run(trainer, 0, 2)
    assert found == [[], []]
    assert trainer.checker.pending is not None
    with Waits() as waits:
        trainer.storage = EventStorage()
        with trainer.storage:
            trainer.iter = 2
            trainer.run_step()
    assert waits.found  # the instrument works: this iteration logs
    assert trainer.checker.pending is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_metrics_are_logged_beside_the_losses(tmp_path, dtype):
    """As means since the last log, outside the sum, with the same losses as without them."""
    every = run(make_seeded(tmp_path, dtype=dtype, log_matching=True), 0, 4)
    other = run(make_seeded(tmp_path, dtype=dtype, log_matching=True, log_period=2), 0, 4)
    without = run(make_seeded(tmp_path, dtype=dtype), 0, 4)
    assert every["total_loss"] == without["total_loss"]
    assert set(every) - set(without) == set(MatchingMetrics.NAMES)
    for name in MatchingMetrics.NAMES:
        values = [value for value, _ in every[name]]
        means = [sum(values[:2]) / 2, sum(values[2:]) / 2]
        assert [value for value, _ in other[name]] == pytest.approx(means, rel=1e-5)


def test_metrics_wait_for_nothing_and_cost_nothing_when_off(tmp_path, monkeypatch):
    trainer = make(tmp_path, log_period=100, log_matching=True)
    forward, found = MatchingMetrics.add, []

    def add(*args):
        with Waits() as waits:
            forward(*args)
        found.append(waits.found)

    monkeypatch.setattr(MatchingMetrics, "add", add)
    run(trainer, 0, 2)
    assert found == [[], []]
    run(make(tmp_path, log_period=100), 0, 2)
    assert len(found) == 2


def test_a_criterion_without_metrics_is_named_in_the_first_step(tmp_path):
    class TwoArguments(torch.nn.Module):
        def forward(self, outputs, targets):
            return {"loss_own": outputs.decoder.boxes.sum()}

    model = tiny_detector()
    model.criterion = TwoArguments()
    with pytest.raises(UserError, match=r"train\.log_matching=True, but the criterion takes no `metrics`"):
        run(make(tmp_path, model, log_matching=True), 0, 1)


class Operations(TorchDispatchMode):
    """Counts operations, each of which is a launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_many_losses_take_no_more_operations_than_few(tmp_path):
    """Besides those that the criterion itself spends on them."""

    class Losses(torch.nn.Module):
        def __init__(self, count):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(count))

        def forward(self, batch):
            return {f"loss_{n}": x for n, x in enumerate(self.weight.unbind())}

    counts = []
    for losses in (3, 39):
        trainer = make(tmp_path, Losses(losses), log_period=100)
        run(trainer, 0, 2)  # what happens in the first iterations only
        with Operations() as operations:
            run(trainer, 2, 3)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_logged_losses_are_means_since_the_last_log(tmp_path):
    every = run(make_seeded(tmp_path, log_period=1), 0, 4)
    third = run(make_seeded(tmp_path, log_period=2), 0, 4)
    assert [iteration for _, iteration in third["total_loss"]] == [1, 3]
    values = [value for value, _ in every["total_loss"]]
    means = [sum(values[:2]) / 2, sum(values[2:]) / 2]
    assert [value for value, _ in third["total_loss"]] == pytest.approx(means, rel=1e-5)


def make_seeded(folder, **options):
    torch.manual_seed(3)
    return make(folder, **options)


def test_the_same_seed_gives_the_same_losses(tmp_path):
    first, second, other = (run(make_seeded(tmp_path, seed=seed), 0, 3)["total_loss"] for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_a_resumed_optimizer_keeps_the_rate_of_the_recipe(tmp_path):
    trainer = make(tmp_path, lr=1e-3)
    run(trainer, 0, 2)
    other = make(tmp_path, lr=5e-4)
    other.load_state_dict(trainer.state_dict())
    assert other.iter == 1
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"]) == (5e-4, 5e-4)
    moments = [state["exp_avg"] for state in other.optimizer.state.values()]
    assert any(moment.abs().sum() > 0 for moment in moments)


def test_another_seed_on_resume_is_told(tmp_path, caplog):
    trainer = make(tmp_path, seed=1)
    run(trainer, 0, 1)
    other = make(tmp_path, seed=2)
    other.load_state_dict(trainer.state_dict())
    assert other.seed == 1
    assert "the seed is that of the run which is continued: 1, not 2" in caplog.text


def test_host_memory_stays_flat(tmp_path):
    """Over three rounds of many iterations and an evaluation each."""
    trainer = make(tmp_path, log_period=20)
    used = []  # pages
    for round_ in range(4):
        run(trainer, round_ * 40, (round_ + 1) * 40)
        trainer.model.eval()
        for _ in range(20):
            trainer.model(BATCH)
        trainer.model.train()
        used.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert (used[-1] - used[1]) * resource.getpagesize() < 20 * 2**20


# Starting again


def choose(folder, *words):
    args = parse(*words)
    cfg = OmegaConf.create({"train": {"output_dir": str(folder)}})
    with recipe.claim_output(cfg, eval_only=args.eval_only, resume=args.resume) as resume:
        return resume


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ({"TORCHELASTIC_RUN_ID": "a1"}, {"TORCHELASTIC_RUN_ID": "a1", "TORCHELASTIC_RESTART_COUNT": "1"}),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
    ],
)
def test_a_restart_of_the_same_run_resumes_by_itself(tmp_path, monkeypatch, first, again):
    for environment in (first, again):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        assert choose(tmp_path) == ("RESTART" in str(environment))
        note_start(tmp_path)
        (tmp_path / "model_0000001.pth").touch()


def test_other_starts_in_a_used_folder_are_refused(tmp_path, monkeypatch):
    """Also where torchrun starts for a second time what was refused for the first time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a1")
    note_start(tmp_path)
    (tmp_path / "model_0000001.pth").touch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b2")
    for count in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with pytest.raises(UserError, match=r"holds a run \(model_0000001\.pth\): add --resume"):
            choose(tmp_path)
    assert choose(tmp_path, "--resume")


def test_errors_that_the_program_prints_leave_no_traceback(caplog):
    """Detectron2 logs a traceback of whatever ends a training."""
    for error, logged in ((UserError("the disk is full"), 0), (KeyError("a bug"), 1)):
        caplog.clear()
        try:
            raise error
        except Exception:
            logging.getLogger("detectron2.engine.train_loop").exception("Exception during training:")
        assert len(caplog.records) == logged


class OldDetector(DINODetector):
    """A person's subclass with Detectron2's own signature."""

    def forward(self, batched_inputs):
        return super().forward(batched_inputs)


def test_a_subclass_of_one_argument_trains(tmp_path):
    model = tiny_detector()
    old = OldDetector(network=model.network, criterion=model.criterion, num_classes=model.num_classes).train()
    run(make(tmp_path, old, skip_non_finite=True), 0, 2)
    with pytest.raises(UserError, match="OldDetector takes no `normalizer`"):
        run(make(tmp_path, old, grad_accum_steps=2), 0, 1)


class _Fails(HookBase):
    """Fails where it is asked to, and counts its ends."""

    def __init__(self, before=None, after=None):
        self.before, self.after, self.ends = before, after, 0

    def before_train(self):
        if self.before:
            raise self.before
        self.bar = 1

    def after_train(self):
        self.ends += 1
        if self.after:
            raise self.after
        assert self.bar, "only where before_train has run"


@pytest.mark.parametrize("error", [UserError("can't write model.pth"), KeyError("a bug"), KeyboardInterrupt()])
def test_the_first_error_is_not_hidden_by_the_end_of_other_hooks(tmp_path, error):
    trainer = make(tmp_path)
    hooks = [_Fails(), _Fails(before=error), _Fails(), _Fails(after=UserError("can't write curves.png"))]
    trainer.register_hooks(hooks)
    with pytest.raises(type(error)) as caught:
        trainer.train(0, 1)
    assert caught.value is error
    assert [hook.ends for hook in hooks] == [1] * 4


@pytest.mark.parametrize("end", [None, EndOfTraining(), Stopped(143)])
def test_an_error_at_the_end_of_a_training_is_shown(tmp_path, end):
    trainer = make(tmp_path)
    hooks = [_Fails(after=UserError("first")), _Fails(after=UserError("second"))]
    trainer.register_hooks([*hooks, CallbackHook(after_step=lambda _: (_ for _ in ()).throw(end))] if end else hooks)
    with pytest.raises(UserError, match="first"):
        trainer.train(0, 1)
    assert [hook.ends for hook in hooks] == [1, 1]
