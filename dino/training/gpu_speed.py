"""Settings of a recipe for the speed of a GPU: precision of float32, compilation, CUDA graphs."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from omegaconf import DictConfig
from torch import nn

from dino.modeling import compile_network, use_float32_precision
from dino.modeling.detector import Detector
from dino.utils.files import DataError


def use_precision(cfg: DictConfig) -> None:
    """Apply `train.float32_precision`.

    Raises:
        DataError: its value is unknown.
    """
    try:
        use_float32_precision(cfg.train.float32_precision)
    except ValueError as error:
        raise DataError(f"train.float32_precision: {error}") from error


def use_deterministic_kernels(cfg: DictConfig) -> None:
    """Choose kernels that give the same bits again, where PyTorch has them, if `train.deterministic` asks for them."""
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)  # a few kernels have no such form, see the docs


def compile_if_wanted(cfg: DictConfig, model: nn.Module) -> None:
    """Apply `train.compile`, before the model is wrapped for several processes.

    Writes PyTorch's warnings to the log of the run, such as that a function with too many graphs runs uncompiled.

    Raises:
        DataError: the model is no `Detector`.
    """
    if not cfg.train.compile:
        return
    if not isinstance(model, Detector):
        raise DataError(f"train.compile=True: only DINODetector can be compiled, not {type(model).__name__}")
    for handler in logging.getLogger("detectron2").handlers:
        logging.getLogger("torch._dynamo").addHandler(handler)
    compile_network(model.network)


def replayed(model: nn.Module, most: int) -> AbstractContextManager[None]:
    """Context where a `Detector` replays CUDA graphs, see `Detector.replay`; other detectors stay as they are."""
    return model.replay(most) if isinstance(model, Detector) else nullcontext()
