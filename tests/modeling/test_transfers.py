"""A training step waits for the device once: when the matcher fetches its costs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dino.layers import (
    HungarianMatcher,
    IoUAwareLoss,
    MultiScaleDeformableAttention,
    SetCriterion,
    SquaredIoULoss,
    Target,
    deform_attn_implementation,
)
from dino.modeling.variants import (
    CombinedCriterion,
    HybridBranch,
    MixedMatchingCriterion,
    OneToManyCriterion,
    PositionModulatedMatcher,
    RankedCriterion,
    SecondPass,
    SharedHybridBranch,
    ThresholdMatcher,
)

from ..tiny import random_batch, random_targets, tiny_network

# What makes the host wait on a GPU: a number or a size that only the device knows.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2", "bincount"}


class Waits(TorchDispatchMode):
    """Notes operations that wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in WAITING or masks:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


CRITERIA = {
    "plain": lambda: SetCriterion(matcher=HungarianMatcher()),
    "mixed": lambda: MixedMatchingCriterion(matcher=HungarianMatcher(), class_loss=IoUAwareLoss()),
    "position": lambda: SetCriterion(matcher=PositionModulatedMatcher(), class_loss=SquaredIoULoss()),
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_training_step_waits_for_the_matcher_only(criterion):
    model, criterion = tiny_network(), CRITERIA[criterion]()
    with Waits() as waits:
        train(model, criterion, random_batch(2), random_targets(2, 3))
    assert waits.seen == []


def test_branches_wait_for_their_matchers_only():
    matcher, quality = HungarianMatcher(), IoUAwareLoss()
    branches = {
        "shared": SharedHybridBranch(num_queries=20, embed_dim=32),
        "hybrid": HybridBranch(num_queries=20, num_classes=3, embed_dim=32),
        "pass": SecondPass(),
    }
    parts = {
        "shared": OneToManyCriterion(matcher=matcher, copies=2),
        "hybrid": MixedMatchingCriterion(matcher=matcher, class_loss=quality),
        "pass": RankedCriterion(matcher=ThresholdMatcher(), class_loss=quality),
    }
    criterion = CombinedCriterion(criterion=SetCriterion(matcher=matcher), branches=parts)
    with Waits() as waits:
        train(tiny_network(branches=branches), criterion, random_batch(2), random_targets(2, 3))
    assert waits.seen == []


def train(model, criterion, batch, targets):
    sum(criterion(model(*batch, targets), targets).values()).backward()


class FixedMatcher(nn.Module):
    """Object g belongs to query g; nothing is fetched from the device."""

    def forward(self, predictions, targets):
        pairs = [(np.arange(len(t.labels)),) * 2 for t in targets]
        return [pairs] * len(predictions.logits)


def attention_without_content(value, shapes, locations, weights):
    batch, queries = locations.shape[:2]
    everything = value.sum() + locations.sum() + weights.sum()
    return everything.expand(batch, queries, value.shape[2] * value.shape[3])


def test_nothing_is_moved_to_the_device_in_a_way_that_waits(monkeypatch):
    """On the device of tensors without content, where a number that the host asks for is an error."""
    names = MultiScaleDeformableAttention.forward.__globals__  # the module has the name of the function
    monkeypatch.setitem(names, "deform_attn", attention_without_content)
    model, criterion = tiny_network().to("meta"), SetCriterion(matcher=FixedMatcher())
    targets = [Target(*(x.to("meta") for x in t)) for t in random_targets(2, 3)]
    batch = [x.to("meta") for x in random_batch(2)]
    with Copies() as copies, deform_attn_implementation("reference"):
        train(model, criterion, batch, targets)
    assert copies.seen == [True] * len(copies.seen)
    assert len(copies.seen) > 3


@pytest.mark.parametrize("recording", [False, True])
def test_inference_moves_nothing_to_the_device_while_a_cuda_graph_is_recorded(monkeypatch, recording):
    names = MultiScaleDeformableAttention.forward.__globals__
    monkeypatch.setitem(names, "deform_attn", attention_without_content)
    monkeypatch.setattr("dino.structures.recording", lambda device: recording)
    model, batch = tiny_network().eval().to("meta"), [x.to("meta") for x in random_batch(2)]
    with Copies() as copies, torch.no_grad(), deform_attn_implementation("reference"):
        model(*batch)
    assert (len(copies.seen) == 0) == recording


class Copies(TorchDispatchMode):
    """Notes for each copy to another device whether it goes on without waiting."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function is torch.ops.aten._to_copy.default and device is not None and device != args[0].device:
            self.seen.append(kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


def test_waits_are_seen():
    x = torch.tensor([1.0, 2.0])
    with Waits() as waits:
        x[x > 1]
        x.sum().item()
    assert waits.seen == ["index", "_local_scalar_dense"]
    with Copies() as copies:
        x.to("meta")
        x.to("meta", non_blocking=True)
    assert copies.seen == [False, True]
