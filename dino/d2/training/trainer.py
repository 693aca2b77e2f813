"""One training step: Detectron2's trainer with mixed precision, accumulation, and a check for non-finite steps."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from dino.d2.meta_arch import DINODetector
from dino.layers.criterion import check_normalizer
from dino.layers.matcher import takes
from dino.utils.files import Stopped, UserError

from .memory_saving import OutOfMemory, advice
from .non_finite import NonFiniteChecker
from .parallel import gradients_shared, local, shard_like, unwrapped, whole
from .sampler import TrainLoader, seed_random

logger = logging.getLogger("detectron2.dino")


class EndOfTraining(Exception):
    """Training ends before its last iteration, after the same one on all processes."""


# Detectron2 logs a traceback of every error that ends a training; the program prints these in one line.
_ONE_LINE_ERRORS = (UserError, FloatingPointError, OutOfMemory, EndOfTraining, Stopped, OSError)
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], _ONE_LINE_ERRORS))
)


class Trainer(SimpleTrainer):
    """SimpleTrainer with autocast on any device, loss scaling, accumulation, clipping, and a check for finite steps.

    Every iteration seeds its random numbers from the seed, its number and the rank, so that a resumed run needs no
    random states. An iteration that does not log waits for the device only in the model's own transfers.

    Accumulation: one step takes `grad_accum_steps` batches, its parts. The losses of a `DINODetector` are divided by
    the number of objects of all parts and processes, so the sum over the parts is the loss of the whole batch. Two
    things differ from the whole batch: each part is padded to its own largest image, and the fullest image of each part
    determines its denoising groups and padding queries. Where size and number of objects of these images are equal,
    losses and gradients are those of the whole batch, except for the random noise. The fullest image affects only the
    `_dn` losses. Losses of other detectors are averaged over the parts.

    Args:
        model, data_loader, optimizer: as of SimpleTrainer; a `TrainLoader` starts where the training starts.
        dtype: float32, bfloat16 or float16, of the forward pass.
        clip_norm: largest L2 norm of all gradients together.
        output_dir: folder for batches with a loss or gradient that is infinite or NaN.
        seed: of the run.
        grad_accum_steps: number of batches of the loader in one step.
        log_period: iterations over which the logged losses are averaged.
        skip_non_finite: skip a step with a loss or gradient that is infinite or NaN, instead of stopping.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        dtype: str = "float32",
        clip_norm: float = 0.1,
        output_dir: str = ".",
        seed: int = 0,
        grad_accum_steps: int = 1,
        log_period: int = 1,
        skip_non_finite: bool = False,
    ):
        super().__init__(model, data_loader, optimizer, gather_metric_period=log_period)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device_type = self.parameters[0].device.type
        self.waits = self.device_type == "cpu"  # a CPU has finished the step at once
        self.dtype = getattr(torch, dtype)
        self.scaled = self.dtype == torch.float16
        # Also with a scale of 1, the scaler suppresses a non-finite step on the device.
        self.scaler = torch.amp.GradScaler(self.device_type, init_scale=2.0**16 if self.scaled else 1.0)
        self.clip_norm = clip_norm
        self.seed = seed
        self.grad_accum_steps = grad_accum_steps
        self.checker = NonFiniteChecker(unwrapped(model), output_dir, skip=skip_non_finite, scaled=self.scaled)
        self.stop_requested = False  # of this process; see NonFiniteChecker.stop_agreed
        self.batch: list[dict] = []
        self.names: list[str] = []
        self.sums: Tensor | None = None  # one for each name, of the finite steps since the last log
        self.start_loader(0)

    def start_loader(self, iteration: int) -> None:
        """Start the data with the batch of `iteration`."""
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.begin(seed=self.seed, start=iteration, parts=self.grad_accum_steps)
        elif iteration:
            logger.warning(
                "the recipe's train loader can't start in the middle: images come in another order than before"
            )

    def request_stop(self) -> None:
        """Ask for an end of the training; all processes learn of it in the next step, see `NonFiniteChecker`."""
        self.stop_requested = True

    def after_train(self) -> None:
        """Let every hook clean up. An error that ends the training is not hidden by one of a hook, which may follow it:
        of a hook whose `before_train` never ran, or by the same full disk.
        """
        self.storage.iter = self.iter
        ending = sys.exception()
        first = None if isinstance(ending, EndOfTraining | Stopped) else ending
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                first = first or error
        if first is not None and first is not ending:
            raise first

    def run_step(self) -> None:
        """Run one iteration."""
        start = time.perf_counter()
        parts = [next(self._data_loader_iter) for _ in range(self.grad_accum_steps)]
        data_time = time.perf_counter() - start
        self.batch = [x for part in parts for x in part]
        seed_random(self.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad()
        with advice():
            losses = self.accumulate(parts)
            self.after_backward()
            self.update(losses)
        logs = (self.iter + 1) % self.gather_metric_period == 0 or self.iter + 1 == getattr(self, "max_iter", None)
        if logs or self.waits:
            self.checker.check()
        if logs:
            self.log(data_time)

    def accumulate(self, parts: list[list[dict]]) -> dict[str, Tensor]:
        """Compute the gradients of all parts -> the losses, summed over the parts, detached."""
        totals = None
        options = self.loss_options(parts)
        average = len(parts) > 1 and "normalizer" not in options
        self.checker.begin()
        for number, part in enumerate(parts, 1):
            with gradients_shared(self.model, number == len(parts)):
                losses = self.forward(part, options)
                self.checker.check()  # of the step before: the host has just waited for the matcher's costs
                values = torch.stack(list(losses.values()))
                values = values / len(parts) if average else values
                self.scaler.scale(values.sum()).backward()
            totals = values.detach() if totals is None else totals + values.detach()
        return dict(zip(losses, totals, strict=True))

    def loss_options(self, parts: list[list[dict]]) -> dict[str, Any]:
        """Arguments for the losses of a `DINODetector` (see `SetCriterion.forward`) that differ from their defaults."""
        model = unwrapped(self.model)
        if not isinstance(model, DINODetector):
            return {}
        skip = self.checker.skip and takes(model, "non_finite")
        options: dict[str, Any] = {"non_finite": "match"} if skip else {}
        if len(parts) > 1:
            check_normalizer(model)
            options["normalizer"] = model.loss_normalizer([len(x["instances"]) for part in parts for x in part])
        return options

    def forward(self, data: list[dict], options: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch. An error about non-finite predictions ends the training; steps to skip raise none."""
        try:
            with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
                return self.model(data, **options)
        except FloatingPointError as error:
            self.checker.report(self.iter, data, str(error))
            raise

    def update(self, losses: dict[str, Tensor]) -> None:
        """Clip the gradients, then step, unless a loss or gradient is not finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        norm = norm / self.scaler.scale(torch.ones_like(norm))
        norm, usable = self.checker.judge(self.iter, self.batch, losses, norm, self.stop_requested)
        torch._foreach_mul_([local(g) for g in gradients], (self.clip_norm / (norm + 1e-6)).clamp(max=1))
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scaled else 1.0)
        self.add_up(losses, norm, usable)

    def add_up(self, losses: dict[str, Tensor], norm: Tensor, usable: Tensor) -> None:
        """Add losses and gradient norm of a step to the sums since the last log."""
        finite = norm.isfinite()
        others = {"usable": usable, "grad_norm": torch.where(finite, norm, 0), "finite": finite}
        values = torch.where(usable, torch.stack(list(losses.values())).float(), 0)
        numbers = torch.cat([values, torch.stack([x.float() for x in others.values()])])
        names = [*losses, *others]
        self.sums = numbers if names != self.names or self.sums is None else self.sums + numbers
        self.names = names

    def log(self, data_time: float) -> None:
        """Write the means since the last log to the event storage; one transfer from the device."""
        values = dict(zip(self.names, self.sums.cpu(), strict=True))
        self.sums = None
        usable, finite, norm = (values.pop(name).item() for name in ("usable", "finite", "grad_norm"))
        if comm.is_main_process():
            storage = get_event_storage()
            storage.put_scalar("skipped_steps", self.checker.skipped, smoothing_hint=False)
            if finite:
                storage.put_scalar("grad_norm", norm / finite, smoothing_hint=False)
        if usable:
            self.write_metrics({name: value / usable for name, value in values.items()}, data_time, self.iter)

    def state_dict(self) -> dict:
        """Adds the loss scale, the seed and the number of skipped steps."""
        scaler = self.scaler.state_dict() if self.scaled else {}
        return {**super().state_dict(), "scaler": scaler, "seed": self.seed, "skipped": self.checker.skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue after the iteration of the state. Settings of the optimizer, such as its rate, stay the recipe's."""
        super().load_state_dict({**state_dict, "optimizer": self._optimizer_state(state_dict["optimizer"])})
        if self.scaled and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])
        if self.seed != state_dict["seed"]:
            logger.warning(f"the seed is that of the run which is continued: {state_dict['seed']}, not {self.seed}")
        self.seed = state_dict["seed"]
        self.checker.skipped = state_dict["skipped"]
        self.start_loader(self.iter + 1)

    def _optimizer_state(self, saved: dict) -> dict:
        """The saved moments, cut into shards as the parameters are, with the recipe's settings."""
        groups = [
            {**theirs, **{k: v for k, v in ours.items() if k != "params"}, "initial_lr": ours["lr"]}
            for ours, theirs in zip(self.optimizer.param_groups, saved["param_groups"], strict=True)
        ]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            key: {name: shard_like(x, parameters[key]) for name, x in state.items()}
            for key, state in saved["state"].items()
        }
        return {"state": moments, "param_groups": groups}
