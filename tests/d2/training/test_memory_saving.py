import copy

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyConfig, instantiate

from dino.d2 import DINODetector
from dino.layers import HungarianMatcher
from dino.modeling.variants import CombinedCriterion, OneToManyCriterion, SecondPass, SharedHybridBranch
from dino.structures import Target
from dino.training.memory_saving import OutOfMemory, advice, checkpoint_activations
from dino.utils.files import DataError

from ...tiny import default_criterion, random_boxes, tiny_network
from ..recipes import SMALL
from ..tiny import random_input, stirred, tiny_detector


def gradients(model, inputs):
    torch.manual_seed(1)
    losses = model(inputs)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def resnet():
    """The small recipe's detector, with norms that do not count batches."""
    cfg = LazyConfig.load(str(SMALL))
    cfg.model.network.neck.backbone.stem.norm = cfg.model.network.neck.backbone.stages.norm = "FrozenBN"
    return cfg


@pytest.mark.parametrize("part", ["backbone", "encoder", "decoder"])
def test_gradients_stay_the_same(resnet, part):
    results, calls = [], []
    for parts in ([], [part]):
        torch.manual_seed(0)
        model = stirred(instantiate(resnet.model))
        module = {
            "backbone": model.network.neck.backbone.res4[0].conv1,
            "encoder": model.network.encoder.layers[0].norm,
            "decoder": model.network.decoder.layers[0].self_norm,
        }[part]
        count = []
        module.register_forward_hook(lambda *_, count=count: count.append(1))
        names = list(model.state_dict())
        checkpoint_activations(model, parts)
        assert list(model.state_dict()) == names
        results.append(gradients(model.train(), [random_input("a.png", height=64, width=64)]))
        calls.append(len(count))
    assert calls[1] == calls[0] + 1  # computed again in the backward pass
    (_, ours), (_, theirs) = results
    assert len(ours) == len(theirs) > 100
    for ours_value, theirs_value in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(ours_value, theirs_value, rtol=0, atol=0)


@pytest.mark.parametrize("branch", [SharedHybridBranch(num_queries=20, embed_dim=32), SecondPass()])
def test_gradients_of_a_branch_stay_the_same(branch):
    """The decoder runs twice, each time with its own way in which queries read each other."""
    results = []
    for parts in ([], ["encoder", "decoder"]):
        torch.manual_seed(0)
        network = tiny_network(branches={"more": copy.deepcopy(branch)})
        more = OneToManyCriterion(matcher=HungarianMatcher(), copies=2)
        criterion = CombinedCriterion(criterion=default_criterion(), branches={"more": more})
        model = stirred(DINODetector(network=network, criterion=criterion, num_classes=3))
        checkpoint_activations(model, parts)
        results.append(gradients(model.train(), [random_input("a.png", height=64, width=64)]))
    for ours, theirs in zip(*results, strict=True):
        assert all(map(torch.equal, ours.values(), theirs.values()))
        assert len(ours) == len(theirs) > 20


def test_unknown_parts_are_refused():
    with pytest.raises(DataError, match=r"activation_checkpointing: \['neck'\] is unknown, choose from \['backbone'"):
        checkpoint_activations(tiny_detector(), ["neck"])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory")],
)
def test_running_out_of_memory_names_three_settings(error):
    with pytest.raises(OutOfMemory) as caught, advice():
        raise error
    for setting in ("train.amp.enabled=True", "train.activation_checkpointing=", "train.grad_accum_steps=2"):
        assert setting in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ") as caught, advice():
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, OutOfMemory)


def test_crowds_do_not_cost_more_than_the_budget():
    """500 objects in one image: the denoising queries, and with them the attention, stay within 2 x budget."""
    model = tiny_detector(num_denoising=100)
    crowd = Target(torch.zeros(500, dtype=torch.int64), random_boxes(500))
    dn = model.network.denoising([crowd], 20)
    assert dn.queries.content.shape[1] == 200
    assert dn.queries.attn_mask.shape == (220, 220)
    losses, _ = gradients(model.train(), [random_input("crowd.png", 500)])
    assert all(torch.isfinite(loss) for loss in losses.values())
