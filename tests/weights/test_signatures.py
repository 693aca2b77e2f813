import functools
import random

import pytest
import torch
from torch import nn

from dino.modeling.variants import HybridBranch
from dino.utils.files import DataError
from dino.weights import convert, recognise
from dino.weights.signatures import SIGNATURES, split_copies, strip_wrappers

from ..tiny import tiny_network
from .states import detrex_state, equal, mmdetection_state, official_state, randomise
from .test_checkpoint_formats import shared_network
from .test_former_names import as_before

INNER = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
FRONTS = ["model.", "net.", "detector.", "network.", "module.", "lit.", *(f"{word}." for word in INNER)]


@functools.cache
def states():
    """A file of each format, all of one model."""
    model = shared_network()
    for project in (*model.neck.lateral, *model.neck.extra_levels):
        nn.init.zeros_(project[0].bias)
    own = model.state_dict()
    return own, {
        "own": own,
        "official": official_state(model),
        "detrex": detrex_state(model),
        "huggingface": convert(own, to="huggingface"),
        "mmdetection": mmdetection_state(model),
    }


def wrapped(state, dice):
    """A state dict with random prefixes before all names, and in the middle of some."""
    front = "".join(dice.choices(FRONTS, k=dice.randint(0, 4)))
    places = {key.rsplit(".", dice.randint(1, 3))[0] for key in state if dice.random() < 0.2}
    words = {place: ".".join(dice.choices(INNER, k=dice.randint(1, 2))) for place in sorted(places)}

    def name(key):
        place = max((p for p in words if key.startswith(f"{p}.")), key=len, default=None)
        return key if place is None else f"{place}.{words[place]}{key.removeprefix(place)}"

    return {front + name(key): value for key, value in state.items()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_prefixes_in_any_order(name):
    own, files = states()
    dice = random.Random(sum(map(ord, name)))
    for _ in range(8):
        state = wrapped(files[name], dice)
        assert recognise(state) == name, next(iter(state))
        converted = convert(state)
        converted.pop("denoising.unused_labels", None)
        assert equal(converted, own), next(iter(state))
        assert recognise(strip_wrappers(state)) == name
        assert equal(strip_wrappers(strip_wrappers(state)), strip_wrappers(state))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_formats_own_prefixes_are_not_reported(name):
    state = states()[1][name]
    assert split_copies(state).removed == []
    usual = {"own": "network.", "huggingface": ""}.get(name, "module.")
    assert split_copies({usual + key: value for key, value in state.items()}).removed == (
        ["module."] if usual == "module." else []
    )
    assert split_copies({f"lit.net.{key}": value for key, value in state.items()}).removed == (
        ["lit.net.model."] if name == "huggingface" else ["lit.net."]
    )


def test_the_ports_first_names():
    """Earlier states of the proposal to transformers kept one official name, and its bare model has no `model.`."""
    own, files = states()
    for old, new in (("content_query_embeddings", "tgt_embed"), ("model.", "")):
        state = {key.replace(old, new, 1): value for key, value in files["huggingface"].items()}
        assert recognise(state) == "huggingface"
        assert equal(convert(state), own)


@pytest.mark.parametrize("name", SIGNATURES)
def test_distributed_parts(name):
    """DistributedDataParallel around parts of a model."""
    own, files = states()
    state = {
        key.replace("decoder.", "decoder.module.", 1).replace("backbone.", "backbone.module.", 1): value
        for key, value in files[name].items()
    }
    if name == "own":
        state = {key: value for key, value in state.items() if "level_embed" not in key} | {
            "module.level_embed": own["level_embed"]
        }
        state = {key if key.startswith("module.") else f"module.{key}": value for key, value in state.items()}
    converted = convert(state)
    converted.pop("denoising.unused_labels", None)
    if name != "own":
        assert equal(converted, own)
    else:
        assert converted.keys() == own.keys()


def test_a_backbones_part_may_be_called_module():
    own = tiny_network().state_dict()
    named = {key.replace("backbone.", "backbone.module."): value for key, value in own.items()}
    assert equal(convert(named), named)


def test_own_variants_and_former_names():
    branches = {"many": HybridBranch(num_queries=20, num_classes=3, embed_dim=32)}
    own = tiny_network(branches=branches).state_dict()
    for prefix in ("", "network.", "model.module.network."):
        assert equal(convert({prefix + key: value for key, value in own.items()}), own)
        assert equal(convert({prefix + key: value for key, value in as_before(own).items()}), own)


def test_keys_of_no_copy_stay():
    own = tiny_network().state_dict()
    state = {f"net.{key}": value for key, value in own.items()} | {"criterion.weight": torch.zeros(3)}
    assert set(convert(state)) == {*own, "criterion.weight"}
    counted = {f"module.{key}": value for key, value in own.items()} | {"n_averaged": torch.tensor(7)}
    assert set(convert(counted)) == set(own)


@pytest.mark.parametrize("fronts", [("model.", "ema_model.module."), ("teacher.", "student."), ("ema.", "")])
def test_two_copies_in_one_state_dict(fronts):
    raw, average = (randomise(tiny_network()).state_dict() for _ in range(2))
    marked = [front for front in fronts if "ema" in front or "teacher" in front]
    state = {front + key: value for front in fronts for key, value in (average if front in marked else raw).items()}
    copies = split_copies(state)
    assert equal(copies.raw, raw)
    assert equal(copies.average, average)
    assert equal(convert(state), raw)


def test_an_average_alone():
    own = tiny_network().state_dict()
    copies = split_copies({f"ema_model.module.{key}": value for key, value in own.items()})
    assert copies.raw is None
    assert equal(copies.average, own)
    assert copies.removed == ["ema_model.module."]


def test_names_must_not_collide():
    own = tiny_network().state_dict()
    with pytest.raises(ValueError, match="two keys"):
        strip_wrappers(own | {"_orig_mod.level_embed": own["level_embed"]})


@pytest.mark.parametrize(
    ("keys", "expected", "removed"),
    [
        ("module.conv1.weight module.bn1.bias", "conv1.weight bn1.bias", ["module."]),
        ("model.net.conv1.weight model.net.bn1.bias", "conv1.weight bn1.bias", ["model.", "net."]),
        ("model.backbone.conv1.weight model.backbone.bn1.bias", "backbone.conv1.weight backbone.bn1.bias", ["model."]),
        ("model.conv1.weight bn1.bias", "model.conv1.weight bn1.bias", []),
        ("model.0.weight model.1.bias", "model.0.weight model.1.bias", []),
        ("layer1._orig_mod.weight", "layer1.weight", ["_orig_mod."]),
    ],
)
def test_backbones(keys, expected, removed):
    copies = split_copies({key: torch.zeros(1) for key in keys.split()})
    assert (copies.format, list(copies.raw), copies.average) == (None, expected.split(), None)
    assert copies.removed == removed


def test_other_detectors_are_refused_by_name():
    """Grounding DINO has all that the official format is known by."""
    state = official_state(shared_network())
    state = {f"module.{key}": value for key, value in state.items()} | {
        "module.transformer.encoder.fusion_layers.0.gamma_v": torch.zeros(4)
    }
    assert recognise(state) is None
    with pytest.raises(DataError, match="this is Grounding DINO, and no DINO in a known format"):
        convert(state)
    theirs = mmdetection_state(shared_network()) | {"query_map.weight": torch.zeros(4, 4)}
    with pytest.raises(DataError, match="this is DDQ DETR, and no DINO in a known format"):
        convert(theirs)
