"""A network of the published width, with weights that a formula makes from a seed."""

import importlib.util

import pytest
import torch

from dino.inference.cpu import _use_onednn
from dino.weights import load_weights

from .golden import FOLDER, GoldenFile
from .network import (
    RecordedBackbone,
    build_criterion,
    build_network,
    check_losses,
    check_outputs,
    official_parameters,
    read_noise,
)

golden, inputs = GoldenFile("11"), GoldenFile("07")
CONFIG = inputs.config["config"] | golden.config["config"]
WEIGHTS = inputs.config["weight_dict"]
PADDING = inputs["in/image_mask"]
IMAGES = torch.zeros(len(PADDING), 3, *PADDING.shape[1:])


@pytest.fixture(scope="module")
def official():
    spec = importlib.util.spec_from_file_location("seeded_weights", FOLDER / "seeded_weights.py")
    seeded_weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded_weights)
    return seeded_weights.make_state_dict(FOLDER / "w256_keys.json", golden.config["seed"])


@pytest.fixture
def model(official):
    network = build_network(CONFIG, RecordedBackbone(inputs.numbered("in/feat"), PADDING.shape[1:]))
    assert not load_weights(network, official).problems
    return network


@torch.no_grad()
def test_evaluation(model):
    memory = model.encoder(model.tokenize(model.neck(IMAGES), PADDING))
    every = len(memory.features[0]) // golden["eval/memory_every_4_tokens"].shape[1]
    golden.check("eval/memory_every_4_tokens", memory.features[:, ::every])
    _, usable = model.query_selection.anchors(memory)
    features = model.query_selection.project(memory.features.masked_fill(~usable[..., None], 0))
    logits = model.query_selection.class_head(features)
    golden.check("eval/topk_indices", model.query_selection.select(logits, usable, memory.padding_mask))
    check_outputs(golden, "eval", model(IMAGES, PADDING))


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="oneDNN's operators are those of a CPU")
@torch.no_grad()
def test_evaluation_in_operators_of_onednn(model):
    assert _use_onednn(model)
    check_outputs(golden, "eval", model(IMAGES, PADDING))


def test_training(model, official):
    targets = golden.targets("train")
    objects = sum(len(target.labels) for target in targets)
    repeats = len(golden["train/draw/label_p"]) // objects
    noise = read_noise(golden, "train", repeats, objects, CONFIG["dn_label_noise_ratio"])
    model.denoising.recall(repeats // 2, noise)
    losses = build_criterion(CONFIG)(model(IMAGES, PADDING, targets), targets)
    check_losses(golden, "train", losses, WEIGHTS)
    total = sum(losses.values())
    golden.check("train/total", total)
    total.backward()
    parameters = official_parameters(model, official)
    assert set(golden.below("train/grad_norm/")) == set(parameters)
    for name, parameter in parameters.items():
        golden.check(f"train/grad_norm/{name}", parameter.grad.norm())
