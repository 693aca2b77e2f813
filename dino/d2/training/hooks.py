"""Hooks: checkpoints, averaged weights, a stop by a signal, a progress bar."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from dino.d2.checkpoint import Checkpointer
from dino.training.ema import Ema
from dino.training.progress_bar import ProgressLine
from dino.training.stop_signal import Stopped, StopSignal

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
    """Ctrl-C or SIGTERM stops all processes after the same iteration, with a checkpoint; see `StopSignal`.

    Args:
        checkpoints: writes the checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.signal = StopSignal("") if comm.get_rank() else StopSignal()

    def before_train(self) -> None:
        """Install the signal handlers."""
        self.signal.on_request = self.trainer.request_stop
        self.signal.__enter__()

    def after_step(self) -> None:
        """Stop once all processes know of a request."""
        alone = comm.get_world_size() == 1
        stop = self.signal.requested if alone else self.trainer.checker.stop_agreed
        if stop and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpoints.save(f"model_{self.trainer.iter:07d}")
            logger.warning(f"stopped after {self.trainer.iter + 1} iterations; --resume continues")
            raise Stopped(max(comm.all_gather(self.signal.exit_code)))  # once the checkpoint is written

    def after_train(self) -> None:
        """Restore the previous signal handlers."""
        self.signal.__exit__()


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
