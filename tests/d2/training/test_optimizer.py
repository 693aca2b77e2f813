import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import SwinTransformer
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from dino.d2.detectron2_backbones import vitdet
from dino.d2.training.optimizer import layerwise_params, tenth_for_backbone, tenth_for_backbone_and_offsets
from dino.modeling import ChannelMapper, TorchvisionBackbone
from dino.training.parameter_groups import parameter_groups
from dino.weights.names import DINO_NAMES, rename, rules

from ...tiny import TinyBackbone, tiny_network


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


class Whole(nn.Module):
    """A tiny network with a Swin, under its name in a detector."""

    def __init__(self):
        super().__init__()
        self.network = tiny_network()
        swin = SwinTransformer(
            embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_indices=[1, 2, 3]
        )
        options = {"in_features": ["p1", "p2", "p3"], "out_channels": 32, "norm_groups": 8}
        self.network.neck = ChannelMapper(backbone=swin, **options)


def has_any(name, words):
    return any(word in name for word in words)


# param_dict_type of the official program: (official name -> learning rate, weight decay), our settings, exceptions
NO_DECAY = {"weight_decay": 0.0}
OFFICIAL = {
    "default": (
        lambda name: (1e-5 if "backbone" in name else 1e-4, 0.01),
        {"lr_factor_func": tenth_for_backbone},
        [],
    ),
    "ddetr_in_mmdet": (
        lambda name: (1e-5 if has_any(name, ["backbone.0", "reference_points", "sampling_offsets"]) else 1e-4, 0.01),
        {"lr_factor_func": tenth_for_backbone_and_offsets},
        [],
    ),
    "large_wd": (
        lambda name: (1e-5 if "backbone" in name else 1e-4, 0.0 if has_any(name, ["norm", "bias"]) else 0.01),
        {
            "lr_factor_func": tenth_for_backbone,
            "weight_decay_norm": 0.0,
            "weight_decay_bias": 0.0,
            "overrides": {"in_proj_bias": NO_DECAY, "relative_position_bias_table": NO_DECAY},
        },
        [f"input_proj.{i}.1.weight" for i in (0, 1, 2, "extra.0")],  # norms without "norm" in their names
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("make", [get_default_optimizer_params, parameter_groups])
def test_groups_of_the_official_program(make, name):
    """Its three groupings, which match words in its names of parameters, on both roads."""
    expected, settings, exceptions = OFFICIAL[name]
    model = Whole()
    options = {key: dict(value) if key == "overrides" else value for key, value in settings.items()}
    groups = make(model, base_lr=1e-4, weight_decay=0.01, **options)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    names = {own.removeprefix("network."): id(p) for own, p in model.named_parameters()}
    official = rename(names, rules((own, theirs) for own, theirs, _ in DINO_NAMES))
    assert not [name for name in official if has_any(name, ["query_selection", "neck", "decoder.class_heads"])]
    differ = {name for name, key in official.items() if found[key] != pytest.approx(expected(name))}
    assert differ == set(exceptions)
    assert len({rate for rate, _ in found.values()}) == 2
