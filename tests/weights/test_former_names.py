"""Weights that earlier versions saved, with `neck.coarser` in place of `neck.extra_levels`, load on every road."""

import copy
import json

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dino.weights import convert, load_weights, read_content, recognise
from dino.weights.conversion import convert_file
from dino.weights.description import model_from_checkpoint

from ..tiny import random_batch, tiny_network
from .states import equal, randomise
from .test_checkpoint_formats import shared_network
from .test_description import write
from .test_loading import resnet18


def as_before(state):
    """A state dict under the names of earlier versions."""
    before = {key.replace("neck.extra_levels.", "neck.coarser."): value for key, value in state.items()}
    assert before.keys() != state.keys()
    return before


def assert_current(state):
    assert any("neck.extra_levels." in key for key in state)
    assert not any("coarser" in key for key in state)


@pytest.fixture
def one_process():
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {
    "nothing": lambda network: network,
    "deepcopy": copy.deepcopy,
    "a module": lambda network: nn.ModuleDict({"model": nn.ModuleDict({"network": network})}),
    "torch.compile": torch.compile,
    "averages": AveragedModel,
    "DDP": DistributedDataParallel,
    "FSDP": lambda network: fully_shard(network.to(memory_format=torch.contiguous_format)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_load_state_dict(name, one_process):
    source, target = WRAPPERS[name](randomise(tiny_network())), WRAPPERS[name](tiny_network())
    state = source.state_dict()
    assert_current(state)
    before = as_before(state)
    result = target.load_state_dict(before, strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    full = {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in state.items()}
    loaded = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in target.state_dict().items()}
    assert equal(loaded, full)
    assert before.keys() == as_before(state).keys()  # the caller's dict stays


def test_what_is_missing_goes_by_its_current_name():
    state = as_before(tiny_network().state_dict())
    del state["neck.coarser.0.1.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "neck\.extra_levels\.0\.1\.bias"'):
        tiny_network().load_state_dict(state)


@pytest.mark.parametrize("prefix", ["", "network.", "module.network."])
def test_load_weights(prefix):
    source, average, target = randomise(tiny_network()), randomise(tiny_network()), tiny_network()
    content = {"model": {f"{prefix}{key}": value for key, value in as_before(source.state_dict()).items()}}
    assert recognise(content["model"]) == "own"
    report = load_weights(target, content)
    assert (report.format, report.problems, report.unexpected) == ("own", [], [])
    assert equal(target.state_dict(), source.state_dict())
    content["ema"] = {
        "model": {f"{prefix}{key}": value for key, value in as_before(average.state_dict()).items()},
        "updates": 3,
    }
    load_weights(target, content)
    assert equal(target.state_dict(), average.state_dict())


def test_levels_are_matched_by_stride():
    four, five = resnet18(["res3", "res4", "res5"], 4), resnet18(["res2", "res3", "res4", "res5"], 5)
    report = load_weights(five, as_before(randomise(four).state_dict()))
    assert torch.equal(five.neck.extra_levels[0][0].weight, four.neck.extra_levels[0][0].weight)
    assert report.unexpected == []


@pytest.mark.parametrize("to", ["own", "official", "detrex", "huggingface"])
def test_convert(to):
    own = shared_network().state_dict()
    assert equal(convert(as_before(own), to=to), convert(own, to=to))


def test_both_names_at_once_are_refused():
    own = tiny_network().state_dict()
    with pytest.raises(ValueError, match=r"two keys of the state dict would be called 'neck\.extra_levels\."):
        convert({**own, **as_before(own)})


@torch.no_grad()
@pytest.mark.parametrize("to", ["own", "safetensors"])
def test_files_with_a_description(tmp_path, to):
    model = write(tmp_path / "model.pth")
    content = read_content(tmp_path / "model.pth")
    torch.save({**content, "model": as_before(content["model"])}, tmp_path / "before.pth")
    convert_file(tmp_path / "before.pth", tmp_path / f"now.{to}", to=to)
    written = read_content(tmp_path / f"now.{to}")
    assert_current(written["model"])
    for key in ("names", "about"):
        assert json.dumps(written[key]) == json.dumps(content[key])
    batch = random_batch(2)
    for name in ("before.pth", f"now.{to}"):
        found = model_from_checkpoint(tmp_path / name).network
        assert torch.equal(found(*batch).decoder.boxes, model(*batch).decoder.boxes)
