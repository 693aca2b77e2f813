import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from torch import nn

from dino.d2.detectron2_backbones import vitdet
from dino.d2.training.optimizer import layerwise_params
from dino.modeling import TorchvisionBackbone

from ...tiny import TinyBackbone


class Detector(nn.Module):
    """Holds a backbone where a DINODetector does."""

    def __init__(self, backbone):
        super().__init__()
        self.network = nn.ModuleDict({"neck": nn.ModuleDict({"backbone": backbone, "lateral": nn.Linear(2, 2)})})


def rates(model, **options):
    """Learning rate by the name of each parameter."""
    groups = layerwise_params(model, **options)
    found = {p: group["lr"] for group in groups for p in group["params"]}
    return {name: found[p] for name, p in model.named_parameters() if p.requires_grad}


def test_rates_of_a_vit_are_those_of_detectron2():
    pytest.importorskip("timm", reason="timm is not installed")
    model = Detector(vitdet(embed_dim=32, depth=5, num_heads=2))
    for name, rate in rates(model, base_lr=2e-4, rate=0.7).items():
        theirs = get_vit_lr_decay_rate(name.removeprefix("network.neck."), lr_decay_rate=0.7, num_layers=5)
        assert rate == pytest.approx(2e-4 * theirs), name


def test_rates_fall_towards_the_stem():
    found = rates(Detector(TorchvisionBackbone("convnext_tiny")), base_lr=1.0, rate=0.9)
    prefix = "network.neck.backbone.body.features"
    assert found["network.neck.lateral.weight"] == 1
    assert found[f"{prefix}.7.2.block.0.weight"] == pytest.approx(0.9)
    assert found[f"{prefix}.7.1.block.0.weight"] == pytest.approx(0.9**2)
    assert found[f"{prefix}.1.0.block.0.weight"] == pytest.approx(0.9**18)
    assert found[f"{prefix}.0.0.weight"] == pytest.approx(0.9**19)


def test_as_a_recipe_says_it():
    recipe = L(torch.optim.AdamW)(
        params=L(layerwise_params)(base_lr="${..lr}", rate=0.5, weight_decay_norm=0.0), lr=1e-3, weight_decay=0.1
    )
    recipe.params.model = Detector(TorchvisionBackbone("swin_v2_t"))
    optimizer = instantiate(recipe)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert max(group["lr"] for group in optimizer.param_groups) == 1e-3


def test_backbones_without_blocks_are_refused():
    with pytest.raises(ValueError, match="no blocks found in TinyBackbone"):
        layerwise_params(Detector(TinyBackbone()), base_lr=1.0, rate=0.5)
