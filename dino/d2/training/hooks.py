"""Small hooks for what Detectron2's do not do."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dino.d2.checkpoint import Checkpointer

from .ema import Ema
from .trainer import EndOfTraining

logger = logging.getLogger("detectron2.dino")


class Checkpoints(HookBase):
    """Writes a checkpoint every `period` iterations, keeps the newest `max_to_keep` also over resumed runs, and writes
    `model_final.pth` after the last iteration.

    (fvcore's PeriodicCheckpointer forgets at each resume what it has written, and serves one process.)

    Args:
        checkpointer: writes them; all processes must have this hook.
        period: iterations.
        max_to_keep: number of files; None for all.
        writers: write before each checkpoint, so that a kill between the two leaves no gap in what they wrote.
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
        """Write if it is due."""
        completed = self.trainer.iter + 1
        if completed % self.period == 0:
            self.save(f"model_{self.trainer.iter:07d}")
        if completed == self.trainer.max_iter:
            self.save("model_final")

    def save(self, name: str) -> None:
        """Write one, then remove old ones."""
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
        """Take in the new weights."""
        self.ema.update()


class StopOnSignal(HookBase):
    """Ctrl-C ends the training after an iteration, the same on all processes, with a checkpoint; a second one at once.

    Args:
        checkpoints: writes it.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.before = None
        self.asked_at = 0.0

    def before_train(self) -> None:
        """Begin to listen."""
        self.before = signal.signal(signal.SIGINT, self.on_signal)
        self.process = os.getpid()

    def on_signal(self, *_) -> None:
        """Note the wish. Torchrun repeats what the terminal has sent already, hence the time.

        The processes that read images inherit this, and so go on.
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
        """Stop if all processes know that one wants to."""
        alone = comm.get_world_size() == 1
        stop = self.trainer.stop_requested if alone else self.trainer.checker.stop_agreed
        if stop and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpoints.save(f"model_{self.trainer.iter:07d}")
            logger.warning(f"stopped after {self.trainer.iter + 1} iterations; --resume continues")
            raise EndOfTraining

    def after_train(self) -> None:
        """Listen no more."""
        signal.signal(signal.SIGINT, self.before or signal.SIG_DFL)


class ProgressBar(HookBase):
    """A bar on a terminal, in a line of its own below the log; nothing where the output goes to a file."""

    def before_train(self) -> None:
        """Draw it."""
        start, stop = self.trainer.start_iter, self.trainer.max_iter
        self.bar = tqdm(total=stop, initial=start, disable=None, unit="it", dynamic_ncols=True, leave=False)
        self.redirect = logging_redirect_tqdm([logging.getLogger("detectron2")])
        if not self.bar.disable:
            self.redirect.__enter__()

    def after_step(self) -> None:
        """Move it."""
        self.bar.update()

    def after_train(self) -> None:
        """Remove it."""
        if not self.bar.disable:
            self.redirect.__exit__(None, None, None)
        self.bar.close()
