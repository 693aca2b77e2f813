"""Kinds of numbers, and numbers that are none."""

import copy

import pytest
import torch

from dino.utils.files import DataError
from dino.weights import load_weights

from ..tiny import tiny_network
from .states import equal, randomise
from .test_load_report import classifier, resnet18

NAME = "encoder.layers.0.norm.weight"


def refuse(state, message, **wishes):
    """Loading raises a DataError with this message; the model stays."""
    target = tiny_network()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(DataError, match=message):
        load_weights(target, state, name="some.pth", **wishes)
    assert equal(target.state_dict(), before)


@pytest.mark.parametrize(
    ("values", "what"),
    [([float("nan")], "NaN"), ([float("inf")], "infinite values"), ([float("nan"), -float("inf")], "NaN or infinite")],
)
def test_numbers_that_are_none_are_named(values, what):
    state = randomise(tiny_network()).state_dict()
    for value, layer in zip(values * 2, (0, 1), strict=False):
        state[f"decoder.layers.{layer}.self_norm.bias"][3] = value
    tensors = "decoder.layers.0.self_norm.bias, decoder.layers.1.self_norm.bias: 2 tensors of 119"
    refuse(state, f"some.pth: the file has {what}.* in {tensors}.*use an earlier checkpoint")


def test_many_are_shortened():
    state = {name: torch.full_like(value, float("nan")) for name, value in tiny_network().state_dict().items()}
    refuse(state, r"the file has NaN in level_embed, .* and 116 more: 119 tensors of 119")


def test_only_what_is_used_must_be_finite():
    """Another class's rows, a branch, and the weights where their running average is taken."""
    source = randomise(tiny_network(num_classes=4))
    state = source.state_dict() | {"branches.x.content.weight": torch.full((3,), float("nan"))}
    state["decoder.class_heads.0.bias"][1] = float("nan")
    target = tiny_network(num_classes=2)
    content = {"model": state, "names": list("abcd")}
    load_weights(target, content, classes=["a", "x"])
    assert torch.equal(target.level_embed, source.level_embed)
    with pytest.raises(DataError, match=r"NaN in decoder\.class_heads\.0\.bias: 1 tensors"):
        load_weights(target, content, classes=["b", "x"])
    broken = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    load_weights(tiny_network(), {"model": broken, "ema": randomise(tiny_network()).state_dict()})


def test_large_numbers_are_finite():
    """Their sum is not."""
    state, target = randomise(tiny_network()).state_dict(), tiny_network()
    state[NAME] = torch.full((32,), 3e38)
    load_weights(target, state)
    assert (target.state_dict()[NAME] == 3e38).all()
    state[NAME] = state[NAME].double() * 10
    refuse(state, f"the file has infinite values in {NAME}")


def test_masks_of_the_model_may_be_infinite():
    network = tiny_network()
    network.neck.backbone.register_buffer("mask", torch.tensor([0, -float("inf")]))
    assert not load_weights(network, copy.deepcopy(network.state_dict())).problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted(dtype):
    source, target = randomise(tiny_network()), tiny_network()
    state = {name: value.to(dtype) for name, value in source.state_dict().items()}
    assert not load_weights(target, state).problems
    assert equal(target.state_dict(), {name: value.to(dtype).float() for name, value in source.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("names", [[NAME], ["decoder.class_heads.0.weight"]])
def test_other_kinds_are_refused(dtype, names):
    state = randomise(tiny_network(num_classes=4)).state_dict()
    state |= {name: torch.ones(state[name].shape, dtype=dtype) for name in names}
    kind = str(dtype).removeprefix("torch.")
    refuse(
        {"model": state, "names": list("abcd")}, f"{names[0]} is {kind} in the file and float32", classes=list("abx")
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_quantised_and_empty_tensors_are_refused():
    state = randomise(tiny_network()).state_dict()
    refuse(state | {NAME: state[NAME].to_sparse()}, f"{NAME} is sparse: plain tensors were expected")
    quantised = torch.quantize_per_tensor(state[NAME], 0.1, 0, torch.qint8)
    refuse(state | {NAME: quantised}, f"{NAME} is quantised")
    refuse(state | {NAME: state[NAME].to("meta")}, f"{NAME} is without values")
    refuse({"model": state, "ema": state | {NAME: state[NAME].to_sparse()}}, f"{NAME} is sparse")


def test_counters_of_norms_may_be_averages():
    file = {k: v.float() + 0.5 if k.endswith("num_batches_tracked") else v for k, v in classifier().items()}
    model = resnet18("BN")
    assert not load_weights(model, file).problems
    assert model.neck.backbone.body.bn1.num_batches_tracked == 0
