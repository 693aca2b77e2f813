"""Adapters that run other DINO programs from a checkout: the same images, targets and weights as ours.

The checkouts are read where they lie and are not part of this project. Where a checkout's CUDA extension is not built,
its own fallback in plain PyTorch is used, as its authors wrote it.
"""

import importlib
import runpy
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn


class Contender(NamedTuple):
    """One program with its model."""

    model: nn.Module
    detect: Callable  # images (B, 3, H, W) normalised -> logits (B, Q, C), boxes (B, Q, 4) of the last layer
    losses: Callable  # images, list of Target -> scalar
    stages: dict[str, nn.Module]  # name -> the module that does this part of the work


def official(folder: Path, device: torch.device) -> Contender:
    """IDEA-Research/DINO, R50, 4 scales, with random weights."""
    sys.path.insert(0, str(folder))
    replace_extension(device)
    args = {"device": str(device), "backbone_dir": None, **config_of(folder / "config/DINO/DINO_4scale.py")}
    build = importlib.import_module("models.dino.dino").build_dino
    with random_backbone():
        model, criterion, _ = build(Namespace(**args))
    model.to(device)

    def detect(images: Tensor):
        found = model(list(images))
        return found["pred_logits"], found["pred_boxes"]

    def losses(images: Tensor, targets):
        labelled = [{"labels": t.labels, "boxes": t.boxes} for t in targets]
        found = criterion(model(list(images), labelled), labelled)
        return sum(found[name] * weight for name, weight in criterion.weight_dict.items() if name in found)

    parts = {"backbone": model.backbone, "encoder": model.transformer.encoder, "decoder": model.transformer.decoder}
    return Contender(model, detect, losses, {**parts, "criterion": criterion})


@contextmanager
def random_backbone():
    """torchvision's ResNet-50 from random weights, whatever is asked for: nothing is downloaded."""
    resnet50 = torchvision.models.resnet50

    def build(*, pretrained, **arguments):
        return resnet50(weights=None, **arguments)

    torchvision.models.resnet50 = build
    try:
        yield
    finally:
        torchvision.models.resnet50 = resnet50


def config_of(path: Path) -> dict:
    """The values of a config file of the official program and of those it builds upon."""
    values = runpy.run_path(str(path))
    found: dict = {}
    for base in values.get("_base_", []):
        found |= config_of(path.parent / base)
    return found | {key: value for key, value in values.items() if not key.startswith("_")}


def replace_extension(device: torch.device) -> None:
    """Let the official operator run in the plain PyTorch that lies beside it, where its extension is not built."""
    try:
        importlib.import_module("MultiScaleDeformableAttention")
        if device.type == "cuda":
            return
    except ImportError:
        sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("MultiScaleDeformableAttention")
    functions = importlib.import_module("models.dino.ops.functions")
    plain = importlib.import_module("models.dino.ops.functions.ms_deform_attn_func").ms_deform_attn_core_pytorch
    module = importlib.import_module("models.dino.ops.modules.ms_deform_attn")

    class Plain:
        @staticmethod
        def apply(value, shapes, starts, locations, weights, step):
            return plain(value, shapes, locations, weights)

    functions.MSDeformAttnFunction = module.MSDeformAttnFunction = Plain
