"""One step of a recipe's losses, with the batch in one piece, in parts, or on several processes."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

from dino.d2.training.trainer import Trainer
from dino.layers import LossScaling
from dino.structures import DenoisingQueries

from ..tiny import TinyBackbone
from .recipes import ABLATIONS, RECIPES, ROOT
from .tiny import random_input, stirred

BASE = ROOT / "projects/dino/configs/ablation/base.py"
TINY = [
    "model.num_classes=3",
    "model.network.neck.out_channels=32",
    "model.network.encoder.num_heads=4",
    "model.network.encoder.num_points=2",
    "model.network.encoder.hidden_dim=16",
    "model.network.decoder.num_layers=2",
    "model.network.query_selection.num_queries=12",
]


class Own(nn.Module):
    """A person's wrapper of a criterion: it passes options through."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs, targets, **options):
        return {f"own_{name}": loss for name, loss in self.criterion(outputs, targets, **options).items()}


WRAPPERS = {
    "plain": lambda criterion: criterion,
    "scaled": lambda criterion: LossScaling(criterion=criterion, factors={"loss_bbox": 0.5, "loss_ce": 3.0}),
    "own": lambda criterion: Own(LossScaling(criterion=criterion, factors={"loss_giou": 2.0})),
}


def losses_of(model):
    """What the losses of a recipe depend on, as text: the criterion and the parts whose outputs it gets."""
    model = OmegaConf.to_container(model, resolve=True)
    network, criterion = model["network"], model["criterion"]
    selection, denoising = network["query_selection"], network["denoising"]
    kinds = [network["decoder"]["_target_"], selection["_target_"], denoising["_target_"]]
    sizes = [selection["num_classes"] == model["num_classes"], denoising["num_denoising"] > 0]
    return json.dumps([criterion, kinds, sizes], default=str, sort_keys=True)


@cache
def groups():
    """{a recipe: all recipes with the same losses}, of every recipe of a DINO."""
    found = {}
    for path in [*RECIPES, BASE, *ABLATIONS]:
        found.setdefault(losses_of(LazyConfig.load(str(path)).model), []).append(path)
    return {str(paths[0].relative_to(ROOT)): paths for paths in found.values()}


@cache
def tiny_model(recipe):
    """The model of a recipe, with its criterion and kinds of parts, but tiny; denoising adds no noise."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(ROOT / recipe)), TINY)
    network = cfg.model.network
    network.encoder.num_layers = min(1, network.encoder.num_layers)
    network.denoising.num_denoising = min(8, network.denoising.num_denoising)
    network.denoising.label_noise = network.denoising.box_noise = 0.0
    network.neck.backbone = L(TinyBackbone)()
    network.neck.in_features = ["res3", "res4", "res5"]
    return cfg.model


class PartOfWhole(nn.Module):
    """Denoising queries of the whole batch, of which each part gets those of its own images; noise is the same."""

    def __init__(self, denoising, counts, first):
        super().__init__()
        self.denoising = denoising
        self.denoising.label_noise, self.denoising.box_noise = 0.5, 1.0
        self.whole = [Target(x["instances"]) for x in counts]
        self.first = first

    num_denoised = property(lambda self: self.denoising.num_denoised)
