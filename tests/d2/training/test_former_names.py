"""A run of an earlier version, whose neck had `coarser` in place of `extra_levels`, continues to the last bit."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from dino.d2.checkpoint import Checkpointer
from dino.training.ema import Ema

from ...weights.test_former_names import as_before, assert_current
from ..tiny import random_input, tiny_detector


def start():
    torch.manual_seed(0)
    model = tiny_detector().train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), Ema(model, decay=0.9)


def step(model, optimizer, ema, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    sum(model([random_input("a.jpg"), random_input("b.jpg")]).values()).backward()
    optimizer.step()
    ema.update()


def test_weights_averages_and_moments_continue(tmp_path):
    model, optimizer, ema = start()
    step(model, optimizer, ema, seed=1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
    before = {**content, "model": as_before(content["model"])}
    before["ema"] = {**content["ema"], "model": as_before(content["ema"]["model"])}
    torch.save(before, tmp_path / "before.pth")
    step(model, optimizer, ema, seed=2)

    other = tiny_detector().train()
    checkpointer = Checkpointer(other, str(tmp_path), names=["a", "b", "c"])
    extra = checkpointer.load(str(tmp_path / "before.pth"), checkpointables=[])
    assert checkpointer.problems == []
    optimizer_2, ema_2 = torch.optim.AdamW(other.parameters(), lr=1e-3), Ema(other, decay=0.9)
    optimizer_2.load_state_dict(extra["optimizer"])
    ema_2.load_state_dict(extra["ema"])
    step(other, optimizer_2, ema_2, seed=2)

    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(ema.averaged, ema_2.averaged, strict=True))
    for x, y in zip(optimizer.state.values(), optimizer_2.state.values(), strict=True):
        assert torch.equal(x["exp_avg"], y["exp_avg"])
    checkpointer.save_weights("now")
    saved = torch.load(tmp_path / "now.pth", weights_only=True)
    assert_current(saved["model"])
    assert_current(ema_2.state_dict()["model"])
