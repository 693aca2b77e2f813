"""Schedules of the learning rate: fvcore's, and a warm-up in front of them."""

from __future__ import annotations

from collections.abc import Callable

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
)


def warm_up(
    scheduler: Callable[[float], float],
    warmup_factor: float,
    warmup_length: float,
    warmup_method: str = "linear",
    rescale_interval: bool = False,
) -> CompositeParamScheduler:
    """Put a warm-up before a schedule: Detectron2's `WarmupParamScheduler`.

    Args:
        scheduler: share of the training in [0, 1] -> factor of the learning rate.
        warmup_factor: the first factor, as a share of the schedule's first one.
        warmup_length: of the warm-up, as a share of the training.
        warmup_method: "linear" rises to the schedule, "constant" jumps to it.
        rescale_interval: let the whole schedule follow the warm-up, in place of what is left of it.

    Raises:
        ValueError: another method.
    """
    first = warmup_factor * scheduler(0.0)
    if warmup_method == "linear":
        rise = LinearParamScheduler(first, scheduler(0.0 if rescale_interval else warmup_length))
    elif warmup_method == "constant":
        rise = ConstantParamScheduler(first)
    else:
        raise ValueError(f"warmup_method={warmup_method!r}: write linear or constant")
    scaling = ["rescaled", "rescaled" if rescale_interval else "fixed"]
    return CompositeParamScheduler(
        [rise, scheduler], lengths=[warmup_length, 1 - warmup_length], interval_scaling=scaling
    )
