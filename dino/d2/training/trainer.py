"""One iteration of Detectron2's trainer, as a `TrainingStep`."""

from __future__ import annotations

import logging
import sys
import time
from statistics import fmean
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from dino.training.memory_saving import OutOfMemory
from dino.training.training_step import TrainingStep
from dino.utils.files import Stopped, UserError

from .sampler import TrainLoader, seed_random

logger = logging.getLogger("detectron2.dino")


class EndOfTraining(Exception):
    """Training ends before its last iteration, after the same one on all processes."""


# Detectron2 logs a traceback of every error that ends a training; the program prints these in one line.
_ONE_LINE_ERRORS = (UserError, FloatingPointError, OutOfMemory, EndOfTraining, Stopped, OSError)
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], _ONE_LINE_ERRORS))
)


class Trainer(SimpleTrainer, TrainingStep):
    """SimpleTrainer whose iteration is a `TrainingStep`.

    Every iteration seeds its random numbers from the seed, its number and the rank, so that a resumed run needs no
    random states. An iteration that does not log waits for the device only in the model's own transfers.

    Args:
        model, data_loader, optimizer: as of SimpleTrainer; a `TrainLoader` starts where the training starts.
        grad_accum_steps: number of batches of the loader in one step.
        log_period: iterations over which the logged losses are averaged.
        options: see `TrainingStep`.
    """

    def __init__(
        self, model, data_loader, optimizer, *, grad_accum_steps: int = 1, log_period: int = 1, **options: Any
    ):
        SimpleTrainer.__init__(self, model, data_loader, optimizer, gather_metric_period=log_period)
        TrainingStep.__init__(self, model, optimizer, **options)
        self.grad_accum_steps = grad_accum_steps
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
        seed_random(self.seed, self.iter, comm.get_rank())
        self.take(parts)
        logs = (self.iter + 1) % self.gather_metric_period == 0 or self.iter + 1 == getattr(self, "max_iter", None)
        if logs or self.waits:
            self.checker.check()
        if logs:
            self.log(data_time)

    def compute_losses(self, part: list[dict], options: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of Detectron2's dicts."""
        return self.model(part, **options)

    def count_objects(self, sample: dict) -> int:
        """Number of its instances."""
        return len(sample["instances"])

    def describe(self, sample: dict) -> dict:
        """Its file, image and instances as plain data."""
        return {
            "file_name": str(sample.get("file_name")),
            "image_id": sample.get("image_id"),
            "image": sample["image"],
            "boxes": sample["instances"].gt_boxes.tensor,
            "labels": sample["instances"].gt_classes,
        }

    def log(self, data_time: float) -> None:
        """Write the means since the last log to the event storage."""
        losses, norm, metrics = self.means()
        everywhere = comm.gather(metrics) if metrics else []  # empty on all processes but the main one
        if comm.is_main_process():
            storage = get_event_storage()
            storage.put_scalar("skipped_steps", self.checker.skipped, smoothing_hint=False)
            if norm is not None:
                storage.put_scalar("grad_norm", norm, smoothing_hint=False)
            for name in metrics:
                storage.put_scalar(name, fmean(found[name] for found in everywhere), smoothing_hint=False)
        if losses:
            self.write_metrics({name: torch.tensor(value) for name, value in losses.items()}, data_time, self.iter)

    def state_dict(self) -> dict:
        """Adds the loss scale, the seed and the number of skipped steps."""
        return {**super().state_dict(), **self.state()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue after the iteration of the state. Settings of the optimizer, such as its rate, stay the recipe's."""
        super().load_state_dict({**state_dict, "optimizer": self.optimizer_state(state_dict["optimizer"])})
        warning = self.load_state(state_dict)
        if warning:
            logger.warning(warning)
        self.start_loader(self.iter + 1)
