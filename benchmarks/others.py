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

from dino.layers import Outputs


class Contender(NamedTuple):
    """One program with its model."""

    model: nn.Module
    detect: Callable  # images (B, 3, H, W) normalised -> logits (B, Q, C), boxes (B, Q, 4) of the last layer
    losses: Callable  # images, list of Target -> scalar
    charge: Callable  # Outputs of this project, list of Target -> scalar: matcher and criterion alone
    stages: dict[str, nn.Module]  # name -> the module that does this part of the work


def official(folder: Path, device: torch.device) -> Contender:
    """IDEA-Research/DINO, R50, 4 scales, with random weights."""
    sys.path.insert(0, str(folder))
    replace_extension(device)
    if device.type == "cpu":
        stay_on_cpu()
    args = {"device": str(device), "backbone_dir": None, **config_of(folder / "config/DINO/DINO_4scale.py")}
    build = importlib.import_module("models.dino.dino").build_dino
    with random_backbone():
        model, criterion, _ = build(Namespace(**args))
    model.to(device)

    def detect(images: Tensor):
        found = model(list(images))
        return found["pred_logits"], found["pred_boxes"]

    def losses(images: Tensor, targets):
        labelled = [t._asdict() for t in targets]
        return weigh(model(list(images), labelled), labelled)

    def charge(outputs: Outputs, targets):
        return weigh(official_outputs(outputs), [t._asdict() for t in targets])

    def weigh(outputs, labelled):
        found = criterion(outputs, labelled)
        return sum(found[name] * weight for name, weight in criterion.weight_dict.items() if name in found)

    parts = {"backbone": model.backbone, "encoder": model.transformer.encoder, "decoder": model.transformer.decoder}
    return Contender(model, detect, losses, charge, {**parts, "criterion": criterion})


def official_outputs(outputs: Outputs) -> dict:
    """What the official model would have returned."""

    def layers(predictions):
        *earlier, last = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(*predictions, strict=True)]
        return {**last, "aux_outputs": earlier}

    slots = outputs.denoising.predictions.boxes.shape[2]
    noised = {"pad_size": slots, "num_dn_group": outputs.denoising.num_groups}
    noised["output_known_lbs_bboxes"] = layers(outputs.denoising.predictions)
    (interm,) = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(*outputs.proposals, strict=True)]
    return {**layers(outputs.decoder), "interm_outputs": interm, "dn_meta": noised}


def stay_on_cpu() -> None:
    """The official program moves some of what it makes to a GPU in any case."""
    move = Tensor.to

    def to(self, *args, **kwargs):
        return self if args == ("cuda",) else move(self, *args, **kwargs)

    Tensor.to, Tensor.cuda = to, lambda self: self


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
