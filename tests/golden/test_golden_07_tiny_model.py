"""A whole small network with official weights: evaluation, and training with recorded draws."""

import pytest
import torch

from dino.layers import refine
from dino.weights import load_weights

from .golden import GoldenFile
from .network import (
    RecordedBackbone,
    build_criterion,
    build_network,
    check_losses,
    check_matches,
    check_outputs,
    official_parameters,
    read_noise,
)

golden = GoldenFile("07")
CONFIG, CASES = golden.config["config"], golden.config["train_cases"]
OFFICIAL = golden.below("state_dict/")
PADDING = golden["in/image_mask"]
IMAGES = torch.zeros(len(PADDING), 3, *PADDING.shape[1:])  # the recorded backbone does not look at them


@pytest.fixture
def model():
    network = build_network(CONFIG, RecordedBackbone(golden.numbered("in/feat"), PADDING.shape[1:]))
    assert not load_weights(network, OFFICIAL).problems
    return network


def test_every_official_weight_has_a_place(model):
    report = load_weights(model, OFFICIAL)
    assert (report.format, set(report.loaded)) == ("official", set(model.state_dict()))
    assert not report.problems + report.unexpected


@torch.no_grad()
def test_padding_of_levels(model):
    tokens = model.tokenize(model.neck(IMAGES), PADDING)
    masks = tokens.padding_mask.split([h * w for h, w in tokens.shapes], 1)
    for i in range(len(golden.numbered("in/mask"))):
        golden.check(f"in/mask{i}", masks[i].unflatten(1, tokens.shapes[i]))


@torch.no_grad()
def test_encoder_and_selection(model):
    memory = model.encoder(model.tokenize(model.neck(IMAGES), PADDING))
    golden.check("eval/memory", memory.features)
    selection = model.query_selection
    anchors, usable = selection.anchors(memory)
    features = selection.project(memory.features.masked_fill(~usable[..., None], 0))
    golden.check("eval/enc_output_memory", features)
    logits = selection.class_head(features)
    golden.check("eval/enc_class_all", logits)
    best = selection.select(logits, usable, memory.padding_mask)
    golden.check("eval/topk_indices", best)
    golden.check("eval/init_box_proposal", anchors.take_along_dim(best[..., None], 1).sigmoid())


@torch.no_grad()
def test_decoder_states_and_references(model):
    """The states are read off the decoder's norm; the references are followed from layer to layer."""
    normed, layer_references, layer_outputs = [], [], []

    def note_layer(_, args, output):
        layer_references.append(args[2])
        layer_outputs.append(output)

    model.decoder.norm.register_forward_hook(lambda _, __, output: normed.append(output))
    for layer in model.decoder.layers:
        layer.register_forward_hook(note_layer)
    memory = model.encoder(model.tokenize(model.neck(IMAGES), PADDING))
    queries, _ = model.query_selection(memory)
    model.decoder(queries, memory)
    ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None]
    reference = queries.box_logits.sigmoid()
    for i, x in enumerate(layer_outputs):
        golden.check(f"eval/hs{i}", normed[i])
        golden.check(f"eval/reference{i}", reference)
        assert torch.equal(layer_references[i], reference[:, :, None] * ratios)
        reference = refine(reference, model.decoder.box_heads[i](x))
    golden.check(f"eval/reference{len(layer_outputs)}", reference)


@torch.no_grad()
def test_evaluation(model):
    outputs = model(IMAGES, PADDING)
    assert outputs.denoising is None
    check_outputs(golden, "eval", outputs)
    losses = build_criterion(CONFIG)(outputs, golden.targets("eval"))
    check_losses(golden, "eval", losses, golden.config["weight_dict"])


def train(model, case):
    """Forward and backward of one case."""
    targets, num_groups = golden.targets(case), CASES[case.removeprefix("train/")]["num_dn_group"]
    objects = sum(len(target.labels) for target in targets)
    noise = read_noise(golden, case, 2 * num_groups, objects, CONFIG["dn_label_noise_ratio"])
    model.denoising.recall(num_groups, noise)
    outputs = model(IMAGES, PADDING, targets)
    losses = build_criterion(CONFIG)(outputs, targets)
    sum(losses.values()).backward()
    return outputs, losses, targets


@pytest.mark.parametrize("case", [f"train/{case}" for case in CASES])
def test_training(model, case):
    outputs, losses, targets = train(model, case)
    check_outputs(golden, case, outputs)
    check_losses(golden, case, losses, golden.config["weight_dict"])
    golden.check(f"{case}/total", sum(losses.values()))
    check_matches(golden, case, outputs, build_criterion(CONFIG).matcher, targets)


@pytest.mark.parametrize("case", [f"train/{case}" for case in CASES])
def test_training_gradients(model, case):
    train(model, case)
    parameters = official_parameters(model, OFFICIAL)
    norms = golden.below(f"{case}/grad_norm/")
    assert set(norms) == set(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        golden.check(f"{case}/grad_norm/{name}", parameter.grad.norm())
    golden.check(f"{case}/grad_norm_total", torch.stack([p.grad.norm() for p in parameters.values()]).norm())
    for name in golden.below(f"{case}/grad/"):
        golden.check(f"{case}/grad/{name}", parameters[name].grad)
