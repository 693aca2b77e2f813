import pytest
import torch

from dino.explain import record
from dino.explain.record import _labels_of
from dino.layers import deform_attn
from dino.modeling import Decoder, share_heads
from dino.modeling.variants import (
    LearnedQueries,
    LearnedSizeSelection,
    PositiveDenoising,
    SecondPass,
    SharedHybridBranch,
)

from ..tiny import default_criterion, random_batch, random_targets, tiny_network


def tiny_record(network, counts=(3, 1)):
    return record(network, *random_batch(len(counts)), random_targets(*counts), default_criterion())


def moving_network(**sizes):
    """Whose fresh box heads move something."""
    network = tiny_network(**sizes).eval()
    for head in network.decoder.box_heads:
        torch.nn.init.normal_(head[-1].weight)
    return network


def test_nothing_is_left_behind():
    """No hook, no gradient, no other outputs."""
    network, (images, padding), targets = moving_network(), random_batch(2), random_targets(2, 1)
    torch.manual_seed(1)
    recorded = record(network, images, padding, targets, default_criterion())
    torch.manual_seed(1)
    outputs = network(images, padding, targets)
    torch.testing.assert_close(recorded.outputs.decoder.boxes, outputs.decoder.boxes)
    torch.testing.assert_close(recorded.outputs.denoising.predictions.logits, outputs.denoising.predictions.logits)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not recorded.outputs.decoder.logits.requires_grad


def test_branches_leave_the_record_as_it_is():
    """They run after the main predictions, with the same modules; pictures show the main ones."""
    torch.manual_seed(2)
    network, batch, targets = moving_network(), random_batch(2), random_targets(3, 1)
    records = []
    for branches in ({}, {"more": SharedHybridBranch(num_queries=20, embed_dim=32), "again": SecondPass()}):
        network.branches.update(branches)
        torch.manual_seed(3)
        records.append(record(network, *batch, targets, default_criterion()))
    without, with_branches = records
    assert list(with_branches.outputs.extra) == ["more", "again"]
    assert with_branches.losses == without.losses
    for name in ("tokens", "scores", "anchors", "denoising_labels"):
        assert torch.equal(getattr(with_branches, name), getattr(without, name))
    for ours, theirs in zip(with_branches.samples, without.samples, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert all(torch.equal(with_branches.gradients[name], x) for name, x in without.gradients.items())


def test_selected_tokens_are_those_of_the_queries():
    """The encoder's box head starts at zero, so the initial boxes are the anchors."""
    network = moving_network()
    recorded = tiny_record(network)
    torch.testing.assert_close(recorded.queries.box_logits.sigmoid(), recorded.anchors)
    best = recorded.outputs.proposals.logits[0].sigmoid().amax(-1)
    torch.testing.assert_close(recorded.scores, best)
    assert (best.diff() <= 0).all()


@torch.no_grad()
def test_samples_are_what_the_attention_reads():
    """Reading the memory there with these weights gives the output of the layer's attention."""
    network = moving_network()
    attention, seen = network.decoder.layers[1].cross_attention, []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    recorded = tiny_record(network)
    samples, memory = recorded.samples[1], recorded.memory
    value = attention.value_proj(memory.features).masked_fill(memory.padding_mask[..., None], 0)
    value = value.unflatten(-1, (attention.num_heads, -1))
    locations = samples.locations * memory.valid_ratios[:, None, None, :, None]
    read = attention.output_proj(deform_attn(value, memory.shapes, locations, samples.weights))
    torch.testing.assert_close(read, seen[0][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples.weights.sum((-2, -1)), torch.ones(samples.weights.shape[:3]))
    slots = recorded.denoising.queries.content.shape[1]
    torch.testing.assert_close(recorded.samples[0].boxes[:, slots:], recorded.queries.box_logits.sigmoid())


def test_labels_are_read_off_the_contents():
    network = moving_network()
    embedding = network.denoising.label_embed.weight.detach()
    content = torch.stack([embedding[2], torch.zeros_like(embedding[0]), embedding[0]])[None]
    assert _labels_of(content, embedding).tolist() == [[2, -1, 0]]
    recorded = tiny_record(network)
    slots = recorded.denoising_labels.view(2, -1, 3)
    assert (slots[0] >= 0).all()
    assert (slots[1, :, 0] >= 0).all()
    assert (slots[1, :, 1:] == -1).all()  # one object where three have room


@pytest.mark.parametrize("change", [lambda decoder: decoder, share_heads])
def test_box_losses_pull_at_two_layers(change):
    """Looking forward twice, with heads of their own and with one for all; once, at the predicted step alone."""
    network = moving_network(num_layers=3)
    change(network.decoder)
    gradients = tiny_record(network).gradients
    assert list(gradients) == ["once", "twice"]
    assert type(network.decoder) is Decoder
    predicted, refined = gradients["twice"].permute(2, 0, 1)
    assert torch.equal(predicted > 0, torch.eye(3, dtype=torch.bool))
    torch.testing.assert_close(gradients["once"], torch.stack([predicted, torch.zeros(3, 3)], -1))
    assert torch.equal(refined > 0, torch.eye(3, dtype=torch.bool).roll(1, 0).tril(-1))
    torch.testing.assert_close(refined.diagonal(-1), predicted.diagonal()[1:])


def test_anchors_of_a_learned_size_are_drawn():
    network = moving_network()
    network.query_selection = LearnedSizeSelection(num_queries=12, num_classes=3, embed_dim=32)
    torch.nn.init.constant_(network.query_selection.size.weight, 0.0)  # half of the image, in the finest level
    recorded = tiny_record(network)
    assert not recorded.anchors.requires_grad
    assert (recorded.anchors[..., 2:] == 0.5).all()


def test_matches_and_losses():
    recorded = tiny_record(moving_network(), counts=(3, 0))
    assert [len(query) for query, _ in recorded.matches] == [3, 0]
    assert len(recorded.losses) == 3 * 5  # two layers twice, and the encoder


@pytest.mark.parametrize(("budget", "counts"), [(6, (0, 0)), (0, (2, 1))])
def test_nothing_to_noise(budget, counts):
    with pytest.raises(ValueError, match="nothing to denoise"):
        tiny_record(moving_network(num_denoising=budget), counts)


@pytest.mark.parametrize(
    ("part", "variant", "message"),
    [
        (
            "query_selection",
            lambda: LearnedQueries(num_queries=9, num_classes=3),
            "come from LearnedQueries",
        ),
        ("denoising", lambda: PositiveDenoising(num_classes=3, embed_dim=32), "PositiveDenoising makes no negatives"),
    ],
)
def test_variants_that_cannot_be_drawn_are_named(part, variant, message):
    network = moving_network()
    setattr(network, part, variant())
    with pytest.raises(ValueError, match=message):
        tiny_record(network)
