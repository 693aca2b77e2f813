"""Hooks: checkpoints, averaged weights, a stop by Ctrl-C, a progress bar."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from dino.d2.checkpoint import Checkpointer
from dino.training.progress_bar import ProgressLine

from .ema import Ema
from .trainer import EndOfTraining

logger = logging.getLogger("detectron2.dino")


class Checkpoints(HookBase):
    """Writes a checkpoint every `period` iterations, and `model_final.pth` after the last one.

    Keeps the newest `max_to_keep`, those of resumed runs included. (fvcore's PeriodicCheckpointer does not know files
    from before a resume, and works in one process only.)

    Args:
        checkpointer: writes the files; all processes must have this hook.
        period: iterations.
        max_to_keep: number of files; None for all.
        writers: write before each checkpoint, so that a kill between the two leaves no gap in the metrics.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_to_keep: int | None = None,
        writers: Sequence[EventWriter] = (),
    ):
        self.checkpointer = checkpointer
        self.writers = writers
        self.period = period
        self.max_to_keep = max_to_keep

    def after_step(self) -> None:
        """Write a checkpoint if it is due."""
        completed = self.trainer.iter + 1
        if completed % self.period == 0:
            self.save(f"model_{self.trainer.iter:07d}")
        if completed == self.trainer.max_iter:
            self.save("model_final")

    def save(self, name: str) -> None:
        """Write a checkpoint, then remove old ones."""
        for writer in self.writers:
            writer.write()
        self.checkpointer.save(name, iteration=self.trainer.iter)
        if comm.is_main_process() and self.max_to_keep:
            self.checkpointer.keep(self.max_to_keep)


class AverageWeights(HookBase):
    """Updates the averaged weights after every step."""

    def __init__(self, ema: Ema):
        self.ema = ema

    def after_step(self) -> None:
        """Update the average."""
        self.ema.update()


class StopOnSignal(HookBase):
    """Ctrl-C stops all processes after the same iteration, with a checkpoint; a second Ctrl-C stops at once.

    Args:
        checkpoints: writes the checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.before = None
        self.asked_at = 0.0

    def before_train(self) -> None:
        """Install the signal handler."""
        self.before = signal.signal(signal.SIGINT, self.on_signal)
        self.process = os.getpid()

    def on_signal(self, *_) -> None:
        """Request the stop. Torchrun repeats the terminal's signal, hence the two seconds.

        Loader processes inherit this handler and ignore the signal.
        """
        if os.getpid() != self.process:
            return
        if self.asked_at and time.monotonic() - self.asked_at > 2:
            raise KeyboardInterrupt
        if not self.asked_at:
            logger.info("stopping after this iteration; press again to stop at once, without a checkpoint")
        self.asked_at = self.asked_at or time.monotonic()
        self.trainer.request_stop()

    def after_step(self) -> None:
        """Stop once all processes know of a request."""
        alone = comm.get_world_size() == 1
        stop = self.trainer.stop_requested if alone else self.trainer.checker.stop_agreed
        if stop and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpoints.save(f"model_{self.trainer.iter:07d}")
            logger.warning(f"stopped after {self.trainer.iter + 1} iterations; --resume continues")
            raise EndOfTraining

    def after_train(self) -> None:
        """Restore the previous signal handler."""
        signal.signal(signal.SIGINT, self.before or signal.SIG_DFL)


class ProgressBar(HookBase):
    """The progress on the console, see `ProgressLine`."""

    def __init__(self):
        self.line: ProgressLine | None = None

    def before_train(self) -> None:
        """Start it."""
        self.line = ProgressLine(self.trainer.start_iter, self.trainer.max_iter)
        self.line.__enter__()

    def after_step(self) -> None:
        """Advance it; the loss is that of the last logged iteration."""
        latest = self.trainer.storage.latest()
        values = {"loss": latest["total_loss"][0]} if "total_loss" in latest else {}
        self.line.step(self.trainer.iter + 1, values)

    def after_train(self) -> None:
        """Remove it; an error may have come before its start."""
        if self.line:
            self.line.__exit__()
