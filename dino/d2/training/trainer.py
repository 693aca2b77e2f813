"""One step of training: Detectron2's trainer with mixed precision, accumulation, and steps that must be finite."""

from __future__ import annotations

import logging
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from dino.utils.files import DataError

from .memory_saving import OutOfMemory, advice, counted_together
from .non_finite import NonFiniteChecker
from .parallel import gradients_shared, local, shard_like, unwrapped, whole
from .sampler import TrainLoader, seed_random

logger = logging.getLogger("detectron2.dino")


class EndOfTraining(Exception):
    """Training ends before its last iteration, on all processes at the same one."""


# Detectron2 logs a traceback of whatever ends a training; these are told in one line by the program.
TOLD = (DataError, FloatingPointError, OutOfMemory, EndOfTraining, OSError)
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], TOLD))
)


class Trainer(SimpleTrainer):
    """SimpleTrainer with autocast on any device, loss scaling, accumulation, clipping, and steps that must be finite.

    Every iteration draws its random numbers afresh from the seed, its number and the rank, so that a resumed run needs
    no random states. Nothing waits for the device in an iteration that does not log, except the model's own transfers.

    Args:
        model, data_loader, optimizer: as of SimpleTrainer; a `TrainLoader` is set to start where the training starts.
        dtype: float32, bfloat16 or float16, of the forward pass.
        clip_norm: largest L2 norm of all gradients together.
        output_dir: where the batch goes that made a loss or gradient infinite or NaN.
        seed: of the run.
        grad_accum_steps: batches of the loader that make one step.
        log_period: iterations over which the logged losses are averaged.
        skip_non_finite: go on, without that step, where a loss or gradient is infinite or NaN.
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
        self.waits = self.device_type == "cpu"  # there the host knows at once whether a step was finite
        self.dtype = getattr(torch, dtype)
        self.scaled = self.dtype == torch.float16
        # With a scale of 1 it is still PyTorch's way to suppress, on the device, a step that isn't finite.
        self.scaler = torch.amp.GradScaler(self.device_type, init_scale=2.0**16 if self.scaled else 1.0)
        self.clip_norm = clip_norm
        self.seed = seed
        self.grad_accum_steps = grad_accum_steps
        self.guard = NonFiniteChecker(unwrapped(model), output_dir, skip=skip_non_finite, scaled=self.scaled)
        self.stop_requested = False  # of this process; see NonFiniteChecker.stop_agreed
        self.batch: list[dict] = []
        self.names: list[str] = []
        self.sums: Tensor | None = None  # one for each name, of the finite steps since the last log
        self.start_loader(0)

    def start_loader(self, iteration: int) -> None:
        """Let the data begin with those of `iteration`."""
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.seed, self.data_loader.start = self.seed, iteration
            self.data_loader.parts = self.grad_accum_steps
        elif iteration:
            logger.warning(
                "the recipe's train loader can't start in the middle: images come in another order than before"
            )

    def run_step(self) -> None:
        """One iteration."""
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
            self.guard.check()
        if logs:
            self.log(data_time)

    def accumulate(self, parts: list[list[dict]]) -> dict[str, Tensor]:
        """Gradients of all parts -> the losses, summed over them, detached."""
        totals = None
        self.guard.begin()
        with counted_together(unwrapped(self.model), parts):
            for number, part in enumerate(parts, 1):
                with gradients_shared(self.model, number == len(parts)):
                    losses = self.forward(part)
                    self.guard.check()  # of the step before: the host has just waited for the matcher's costs
                    values = torch.stack(list(losses.values()))
                    self.scaler.scale(values.sum()).backward()
                totals = values.detach() if totals is None else totals + values.detach()
        return dict(zip(losses, totals, strict=True))

    def forward(self, data: list[dict]) -> dict[str, Tensor]:
        """The losses of a batch; predictions that are NaN or infinite end the training."""
        try:
            with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
                return self.model(data)
        except FloatingPointError as error:
            self.guard.report(self.iter, data, str(error))
            raise

    def update(self, losses: dict[str, Tensor]) -> None:
        """Clip, then step, unless something isn't finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        norm = norm / self.scaler.scale(torch.ones_like(norm))
        norm, usable = self.guard.judge(self.iter, self.batch, losses, norm, self.stop_requested)
        torch._foreach_mul_([local(g) for g in gradients], (self.clip_norm / (norm + 1e-6)).clamp(max=1))
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scaled else 1.0)
        self.add_up(losses, norm, usable)

    def add_up(self, losses: dict[str, Tensor], norm: Tensor, usable: Tensor) -> None:
        """Add the numbers of a step to those since the last log."""
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
            storage.put_scalar("skipped_steps", self.guard.skipped, smoothing_hint=False)
            if finite:
                storage.put_scalar("grad_norm", norm / finite, smoothing_hint=False)
        if usable:
            self.write_metrics({name: value / usable for name, value in values.items()}, data_time, self.iter)

    def state_dict(self) -> dict:
        """Adds the loss scale, the seed and the number of skipped steps."""
        scaler = self.scaler.state_dict() if self.scaled else {}
        return {**super().state_dict(), "scaler": scaler, "seed": self.seed, "skipped": self.guard.skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue after the iteration of the state. The optimizer's settings, such as its rate, stay the recipe's."""
        saved = state_dict["optimizer"]
        groups = [
            {**theirs, **{k: v for k, v in ours.items() if k != "params"}, "initial_lr": ours["lr"]}
            for ours, theirs in zip(self.optimizer.param_groups, saved["param_groups"], strict=True)
        ]
        flat = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            key: {name: shard_like(x, flat[key]) for name, x in state.items()} for key, state in saved["state"].items()
        }
        super().load_state_dict({**state_dict, "optimizer": {"state": moments, "param_groups": groups}})
        if self.scaled and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])
        if self.seed != state_dict["seed"]:
            logger.warning(f"the seed is that of the run which is continued: {state_dict['seed']}, not {self.seed}")
        self.seed = state_dict["seed"]
        self.guard.skipped = state_dict["skipped"]
        self.start_loader(self.iter + 1)
