"""What a recipe asks of a GPU for the sake of speed: precision of float32, compiled code, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig
from torch import nn

from dino.d2.meta_arch import DINODetector
from dino.modeling import compile_network, use_float32_precision
from dino.utils.files import DataError


def use_precision(cfg: DictConfig) -> None:
    """Follow `train.float32_precision`.

    Raises:
        DataError: it is no such word.
    """
    try:
        use_float32_precision(cfg.train.float32_precision)
    except ValueError as error:
        raise DataError(f"train.float32_precision: {error}") from error


def compile_if_wanted(cfg: DictConfig, model: nn.Module) -> None:
    """Follow `train.compile`, before the model is wrapped for several processes.

    PyTorch's warnings, such as that a function runs uncompiled after too many graphs, go to the log of the run too.

    Raises:
        DataError: the model is no `DINODetector`.
    """
    if not cfg.train.compile:
        return
    if not isinstance(model, DINODetector):
        raise DataError(f"train.compile=True: only DINODetector can be compiled, not {type(model).__name__}")
    for handler in logging.getLogger("detectron2").handlers:
        logging.getLogger("torch._dynamo").addHandler(handler)
    compile_network(model.network)


@contextmanager
def replayed(model: nn.Module, most: int) -> Iterator[None]:
    """Within, evaluation of a `DINODetector` replays CUDA graphs of so many sizes; of none where `most` is 0."""
    if not most or not isinstance(model, DINODetector):
        yield
        return
    with model.replay(most):
        yield
