"""Keeps non-finite steps from the weights; detected without a device sync."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dino.utils.device import to_host
from dino.utils.files import write_whole

from .shards import process_rank

logger = logging.getLogger("detectron2.dino")
_LONGEST_STREAK = 20  # bad steps in a row that end a training in any case: float16's loss scale is then below 1


class _Step(NamedTuple):
    """A step whose numbers are still on the device."""

    iteration: int
    batch: list
    names: list[str]  # of the losses
    # Losses; norm of the gradients; whether any process has non-finite losses; whether any was asked to stop:
    numbers: Callable[[], Tensor]


class NonFiniteChecker:
    """Checks every step on its device; the host reads the result later.

    The optimizer must leave the weights unchanged where gradients are NaN, as GradScaler ensures. This class restores
    the running statistics of norms.

    Args:
        model: the model in training.
        output_dir: folder for bad batches.
        describe: an image of a batch, with its objects -> dict of plain data: `file_name`, `image_id`, `image`, `boxes`
            xyxy in pixels, `labels`.
        skip: count a bad step and continue, instead of stopping.
        scaled: the loss is scaled (float16), so that gradients may overflow now and then.
    """

    def __init__(self, model: nn.Module, output_dir: str, describe: Callable[[Any], dict], *, skip: bool, scaled: bool):
        self.output_dir = output_dir
        self.describe = describe
        self.skip = skip
        self.scaled = scaled
        self.skipped = 0
        self.streak = 0
        self.stop_agreed = False
        self.pending: _Step | None = None
        norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
        self.statistics = [buffer for module in norms for buffer in module.buffers()]
        self.before: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Keep the running statistics, which the forward pass changes."""
        self.before = [x.clone() for x in self.statistics]

    @torch.no_grad()
    def judge(
        self, iteration: int, batch: list, losses: dict[str, Tensor], norm: Tensor, stop: bool
    ) -> tuple[Tensor, Tensor]:
        """Check a step on the device, and restore the running statistics if it is not finite.

        Args:
            iteration, batch: of the step.
            losses: detached scalars.
            norm: of all gradients together.
            stop: this process was asked to stop, see `stop_agreed`.

        Returns:
            the norm, NaN if a loss or gradient of any process is not finite; whether all losses are finite (bool).
        """
        values = torch.stack(list(losses.values())).float()
        shared = torch.stack([(~values.isfinite()).any().float(), torch.full_like(norm, float(stop))])
        if dist.is_initialized():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        norm = torch.where(norm.isfinite() & (shared[0] == 0), norm, torch.nan)
        for now, before in zip(self.statistics, self.before, strict=True):
            now.copy_(torch.where(norm.isfinite(), now, before))
        numbers = to_host(torch.cat([values, norm[None], shared]))
        self.pending = _Step(iteration, batch, list(losses), numbers)
        return norm, shared[0] == 0

    def check(self) -> None:
        """Read the result of the last step. Waits for the end of that step.

        Raises:
            FloatingPointError: it was not finite, and is not to be skipped.
        """
        step, self.pending = self.pending, None
        if step is None:
            return
        *values, norm, bad_loss, stop = step.numbers().tolist()
        self.stop_agreed = self.stop_agreed or stop > 0
        if np.isfinite(norm):
            self.streak = 0
            return
        self.streak += 1
        if self.scaled and not bad_loss and self.streak < _LONGEST_STREAK:
            return  # the loss scale was too large and has been halved
        what = f"losses {dict(zip(step.names, values, strict=True))}" if bad_loss else "gradients are NaN or infinite"
        self.report(step.iteration, step.batch, what)

    def report(self, iteration: int, batch: list, reason: str) -> None:
        """Save the batch as plain tensors; then count and log the step, or raise a FloatingPointError."""
        rank = f"_rank{process_rank()}" if process_rank() else ""
        path = os.path.join(self.output_dir, f"non_finite_batch_{iteration}{rank}.pth")
        kept = [self.describe(x) for x in batch]
        write_whole(path, lambda part: torch.save(kept, part))
        names = ", ".join(x["file_name"] for x in kept)
        cause = _likely_cause(kept, scaled=self.scaled)
        message = f"iteration {iteration}: {reason}. Images: {names}. The batch is in {path}. {cause}"
        if not self.skip or self.streak >= _LONGEST_STREAK:
            raise FloatingPointError(message)
        self.skipped += 1
        logger.warning(f"{message}. The weights are unchanged; {self.skipped} such steps so far")


def _likely_cause(batch: list[dict], *, scaled: bool) -> str:
    """What to do about a step that is not finite.

    Args:
        batch: entries with `file_name`, `image` and `boxes` xyxy.
        scaled: the network runs in float16.
    """
    for entry in batch:
        boxes = entry["boxes"]
        if not (entry["image"].isfinite().all() and boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            return f"Likely cause: pixels or boxes of {entry['file_name']}, not finite or without size. Fix its input"
    if scaled:
        return "Likely cause: float16 overflows. Use train.amp.dtype=bfloat16, or lower optimizer.lr"
    return "Likely cause: the learning rate is too high. Lower optimizer.lr, or look at the boxes of these images"
