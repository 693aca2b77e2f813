"""Every recipe's network, as the fields of a transformers config."""

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from dino.training.recipe_nodes import plain
from dino.weights.network_parts import build_network
from dino.weights.transformers_folder import describe_fields, fields_of

from .recipes import ABLATIONS, RECIPES

NAMES, IDS = ["red", "green", "blue"], [5, 6, 9]


EXPRESSED = {"dino_r50_5scale_12ep", "dino_convnext_t_4scale_12ep", "chain_5_contrastive"}
KEPT = {"dino_swin_l_384_4scale_12ep", "dino_vitdet_b_4scale_12ep", "dino_r18_small_data"}


def described(paths):
    """The distinct networks of recipes, by the name of the first recipe."""
    found = {}
    for path in paths:
        cfg = LazyConfig.load(str(path))
        cfg.model.num_classes = len(NAMES)
        config = json.loads(json.dumps(plain(OmegaConf.to_container(cfg.model, resolve=True))))
        found.setdefault(json.dumps(config["network"], sort_keys=True), (path.stem, config))
    return dict(found.values())


def build(node):
    with torch.device("meta"):
        return build_network({"network": node})


def facts(network):
    """What a config must bring back, beside names and shapes."""
    position = network.position_encoding
    return (
        {name: tuple(x.shape) for name, x in network.state_dict().items()},
        [name for name, x in network.named_parameters() if not x.requires_grad],
        {name: value for name, value in vars(position).items() if name in ("temperatures", "offset")},
        network.query_selection.anchor_size,
        [layer.attention.num_heads for layer in network.encoder.layers],
        [layer.cross_attention.num_heads for layer in network.decoder.layers],
        network.decoder.class_heads[0] is network.decoder.class_heads[-1],
        [value for name, value in sorted(vars(network.denoising).items()) if name[0] != "_" and name != "training"],
    )


SOME = [path for path in [*RECIPES, *ABLATIONS] if path.stem in EXPRESSED | KEPT]


@pytest.mark.parametrize("paths", [SOME, pytest.param([*SOME, *RECIPES, *ABLATIONS], marks=pytest.mark.slow)], ids=len)
def test_fields_bring_back_the_network_of_a_recipe(paths):
    expressed, kept = set(), set()
    for name, config in described(paths).items():
        fields = json.loads(json.dumps(fields_of(config, NAMES, IDS)))
        node = describe_fields(fields)
        if fields["network"] is not None:
            assert node == config["network"], name
            kept.add(name)
        else:
            assert facts(build(node)) == facts(build(config["network"])), name
            expressed.add(name)
    assert expressed >= EXPRESSED
    assert kept >= KEPT
