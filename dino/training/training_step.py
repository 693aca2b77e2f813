"""One step of the optimizer: mixed precision, accumulation, clipping, and a check for non-finite steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino.layers.criterion import check_normalizer
from dino.layers.matcher import takes
from dino.layers.matching_metrics import MatchingMetrics
from dino.modeling.detector import Detector

from .memory_saving import advice
from .non_finite import NonFiniteChecker
from .shards import gradients_shared, local, shard_like, unwrapped, whole


class _Means(NamedTuple):
    """What the steps since the last log were like."""

    losses: dict[str, float]  # none where no step was finite
    grad_norm: float | None
    metrics: dict[str, float]  # of `MatchingMetrics`; none where they are not logged


class TrainingStep:
    """Autocast on any device, loss scaling, accumulation, clipping, and a check for finite steps.

    A subclass knows what a batch is made of, see `compute_losses`, `count_objects` and `describe`.

    Accumulation: one step takes several batches, its parts. The losses of a `Detector` are divided by the number of
    objects of all parts and processes, so the sum over the parts is the loss of the whole batch. Two things differ from
    the whole batch: each part is padded to its own largest image, and the fullest image of each part determines its
    denoising groups and padding queries. Where size and number of objects of these images are equal, losses and
    gradients are those of the whole batch, except for the random noise. The fullest image affects only the `_dn`
    losses. Losses of other detectors are averaged over the parts.

    Args:
        model: perhaps wrapped for several processes.
        optimizer: of its parameters.
        dtype: float32, bfloat16 or float16, of the forward pass.
        clip_norm: largest L2 norm of all gradients together.
        output_dir: folder for batches with a loss or gradient that is infinite or NaN.
        seed: of the run.
        skip_non_finite: skip a step with a loss or gradient that is infinite or NaN, instead of stopping.
        log_matching: compute the metrics of `MatchingMetrics` too.
    """

    iter = 0  # of the step, from 0 on

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: str = "float32",
        clip_norm: float = 0.1,
        output_dir: str = ".",
        seed: int = 0,
        skip_non_finite: bool = False,
        log_matching: bool = False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device_type = self.parameters[0].device.type
        self.waits = self.device_type == "cpu"  # a CPU has finished the step at once
        self.dtype = getattr(torch, dtype)
        self.scaled = self.dtype == torch.float16
        # Also with a scale of 1, the scaler suppresses a non-finite step on the device.
        self.scaler = torch.amp.GradScaler(self.device_type, init_scale=2.0**16 if self.scaled else 1.0)
        self.clip_norm = clip_norm
        self.seed = seed
        self.log_matching = log_matching
        self.metrics: dict[str, Tensor] = {}  # of the last step
        self.checker = NonFiniteChecker(
            unwrapped(model), output_dir, self.describe, skip=skip_non_finite, scaled=self.scaled
        )
        self.stop_requested = False  # of this process; see NonFiniteChecker.stop_agreed
        self.batch: list = []
        self.names: list[str] = []
        self.sums: Tensor | None = None  # one for each name, of the finite steps since the last log

    def compute_losses(self, part: list, options: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch; `options` are those of `Detector.losses`."""
        raise NotImplementedError

    def count_objects(self, sample: Any) -> int:
        """Number of objects of an image of a batch."""
        raise NotImplementedError

    def describe(self, sample: Any) -> dict:
        """An image of a batch as plain data, see `NonFiniteChecker`."""
        raise NotImplementedError

    def take(self, parts: Sequence[list]) -> None:
        """Compute the gradients of all parts, then update the weights.

        Raises:
            OutOfMemory: names the settings to try.
        """
        self.batch = [x for part in parts for x in part]
        self.optimizer.zero_grad()
        with advice():
            losses = self.accumulate(parts)
            self.after_backward()
            self.update(losses)

    def after_backward(self) -> None:
        """For hooks between gradients and update."""

    def accumulate(self, parts: Sequence[list]) -> dict[str, Tensor]:
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
        self.metrics = options.get("metrics", MatchingMetrics()).values() if self.log_matching else {}
        return dict(zip(losses, totals, strict=True))

    def loss_options(self, parts: Sequence[list]) -> dict[str, Any]:
        """Arguments for the losses of a `Detector` (see `SetCriterion.forward`) that differ from their defaults."""
        model = unwrapped(self.model)
        if not isinstance(model, Detector):
            return {}
        skip = self.checker.skip and takes(model, "non_finite")
        options: dict[str, Any] = {"non_finite": "match"} if skip else {}
        options |= {"metrics": MatchingMetrics()} if self.log_matching and takes(model, "metrics") else {}
        if len(parts) > 1:
            check_normalizer(model)
            options["normalizer"] = model.loss_normalizer([self.count_objects(x) for part in parts for x in part])
        return options

    def forward(self, part: list, options: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch. An error about non-finite predictions ends the training; steps to skip raise none."""
        try:
            with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
                return self.compute_losses(part, options)
        except FloatingPointError as error:
            self.checker.report(self.iter, part, str(error))
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
        """Add losses, metrics and gradient norm of a step to the sums since the last log."""
        finite, logged = norm.isfinite(), {**losses, **self.metrics}
        others = {"usable": usable, "grad_norm": torch.where(finite, norm, 0), "finite": finite}
        values = torch.where(usable, torch.stack(list(logged.values())).float(), 0)
        numbers = torch.cat([values, torch.stack([x.float() for x in others.values()])])
        names = [*logged, *others]
        self.sums = numbers if names != self.names or self.sums is None else self.sums + numbers
        self.names = names

    def means(self) -> _Means:
        """The means since the last call; one transfer from the device."""
        values = dict(zip(self.names, self.sums.cpu(), strict=True))
        self.sums = None
        usable, finite, norm = (values.pop(name).item() for name in ("usable", "finite", "grad_norm"))
        losses = {name: (value / usable).item() for name, value in values.items()} if usable else {}
        metrics = {name: losses.pop(name) for name in self.metrics if name in losses}
        return _Means(losses, norm / finite if finite else None, metrics)

    def state(self) -> dict:
        """The loss scale, the seed and the number of skipped steps."""
        scaler = self.scaler.state_dict() if self.scaled else {}
        return {"scaler": scaler, "seed": self.seed, "skipped": self.checker.skipped}

    def load_state(self, state: dict) -> str | None:
        """Restore what `state` has -> a warning if the seed changes: that of the run which is continued holds."""
        if self.scaled and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        before, self.seed = self.seed, state["seed"]
        self.checker.skipped = state["skipped"]
        if before == self.seed:
            return None
        return f"the seed is that of the run which is continued: {self.seed}, not {before}"

    def optimizer_state(self, saved: dict) -> dict:
        """Saved moments, cut into shards as the parameters are, with the recipe's settings."""
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
