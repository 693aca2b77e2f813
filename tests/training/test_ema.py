import pytest
import torch
from torch import nn

from dino.modeling.detector import Detector
from dino.modeling.transformer import share_heads
from dino.training.ema import Ema

from ..tiny import default_criterion, stirred, tiny_network


def tiny_detector():
    return stirred(Detector(tiny_network(), criterion=default_criterion()))


def test_the_decay_warms_up_to_its_value():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay=0.5)
    expected = model.weight.item()
    for number in range(1, 20):
        stirred(model)
        ema.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model.weight.item()
    assert ema.updates == 19
    assert ema.averaged[0].item() == pytest.approx(expected, rel=1e-5)


def test_shared_parameters_are_averaged_once():
    model = tiny_detector()
    share_heads(model.network.decoder)
    ema = Ema(model, decay=0.9)
    before = [x.clone() for x in ema.averaged]
    stirred(model)
    ema.update()
    state = ema.state_dict()["model"]
    assert state.keys() == model.state_dict().keys()  # under every name
    heads = [state[f"network.decoder.class_heads.{n}.weight"] for n in range(2)]
    assert torch.equal(*heads)
    decay = 2 / 11
    for now, mean, old in zip(ema.current, ema.averaged, before, strict=True):
        torch.testing.assert_close(mean, decay * old + (1 - decay) * now)


def test_applied_swaps_and_restores():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(model, decay=0.9)
    raw = {key: value.clone() for key, value in stirred(model).state_dict().items()}
    model(torch.randn(8, 2))
    raw["1.running_mean"], raw["1.running_var"] = model[1].running_mean.clone(), model[1].running_var.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with ema.applied():
        assert not torch.equal(model[0].weight, raw["0.weight"])
        assert torch.equal(model[1].running_mean, torch.zeros(2))
        assert optimizer.param_groups[0]["params"][0] is model[0].weight
    for key in ("0.weight", "1.running_mean", "1.running_var"):
        assert torch.equal(model.state_dict()[key], raw[key])


def test_its_state_comes_back():
    model = tiny_detector()
    ema = Ema(model, decay=0.9)
    for _ in range(3):
        stirred(model)
        ema.update()
    other = Ema(tiny_detector(), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 3
    assert all(torch.equal(a, b) for a, b in zip(ema.averaged, other.averaged, strict=True))
    fresh = tiny_detector()
    fresh.load_state_dict(ema.state_dict()["model"])
    with ema.applied():
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
