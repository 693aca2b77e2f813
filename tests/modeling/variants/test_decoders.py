import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from dino.layers import deform_attn_implementation, denoising_mask
from dino.modeling import Decoder
from dino.modeling.transformer import DecoderLayer, full_attention
from dino.modeling.variants import LearnedQueries, LookForwardOnce, RelationDecoder
from dino.structures import Queries
from dino.weights import load_weights

from ...descendants.branches import load, memory_of
from ...tiny import default_criterion, random_batch, random_targets, tiny_network

SIZES = {"embed_dim": 32, "num_heads": 4, "num_levels": 4, "num_points": 2, "hidden_dim": 16}
SELECTION = {"num_queries": 12, "num_classes": 3, "embed_dim": 32}
PUBLIC = {  # beginnings of names in the public program -> ours
    "position_relation_embedding.pos_proj.0": "relation",
    "ref_point_head.layers.": "position.",
    "query_scale.layers.": "query_scale.",
    "class_head": "class_heads",
    "bbox_head": "box_heads",
}
PUBLIC_LAYER = {
    "self_attn": "self_attention",
    "cross_attn": "cross_attention",
    "norm1": "cross_norm",
    "norm2": "self_norm",
    "norm3": "feed_forward.norm",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
}


def selected(network, images, padding):
    """Memory and the selection's queries for it."""
    memory = network.encoder(network.tokenize(network.neck(images), padding))
    return memory, network.query_selection(memory)[0]


def stir(module, std=0.1):
    """Leave the start, where heads and relations do nothing."""
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=std)
    return module


def relation_network(num_layers=3):
    """The tiny network with a `RelationDecoder`."""
    network = tiny_network(num_layers=num_layers)
    network.decoder = RelationDecoder(num_classes=3, num_layers=num_layers, **SIZES)
    return network


# Refinement


def reached(decoder, layer):
    """Names of the decoder's parameters that the boxes of a layer reach, and "anchors" where those are."""
    network = tiny_network()
    network.query_selection = LearnedQueries(**SELECTION)
    for head in decoder.box_heads:
        nn.init.normal_(head[-1].weight)
    _, queries = selected(network, *random_batch(2))
    memory = network.tokenize(network.neck(random_batch(2)[0]), random_batch(2)[1])
    named = {**dict(decoder.named_parameters()), "anchors": network.query_selection.anchors.weight}
    boxes = decoder(queries, memory).boxes[layer]
    pulls = torch.autograd.grad(boxes.sum(), named.values(), allow_unused=True)
    return {name for name, pull in zip(named, pulls, strict=True) if pull is not None and pull.any()}


@pytest.mark.parametrize("layer", range(4))
def test_what_the_boxes_of_a_layer_train(layer):
    """Once: their own box head and, through the queries, all layers up to theirs. Twice: also the box head before it.

    Nothing else differs: no class head, no later layer, no earlier box head. Learned anchors are always reached,
    through the codes of their location.
    """
    twice, once = (kind(num_classes=3, num_layers=4, **SIZES) for kind in (Decoder, LookForwardOnce))
    names = reached(once, layer)
    parts = {".".join(name.split(".")[:2]) for name in names if name.startswith(("layers", "box_heads", "class_heads"))}
    assert parts == {f"box_heads.{layer}", *(f"layers.{i}" for i in range(layer + 1))}
    assert "anchors" in names
    before = {name for name, _ in once.named_parameters() if name.startswith(f"box_heads.{layer - 1}.")}
    assert reached(twice, layer) == names | before


def test_once_and_twice_predict_the_same():
    """They differ in gradients alone."""
    network = tiny_network(num_layers=3).eval()
    for head in network.decoder.box_heads:
        nn.init.normal_(head[-1].weight)
    once = LookForwardOnce(num_classes=3, num_layers=3, **SIZES)
    once.load_state_dict(network.decoder.state_dict())
    batch = random_batch(2)
    expected = network(*batch).decoder
    network.decoder = once
    for a, b in zip(network(*batch).decoder, expected, strict=True):
        assert torch.equal(a, b)


# Relation


def our_name(name):
    """The name here of a parameter of the public decoder."""
    for theirs, ours in PUBLIC.items():
        if name.startswith(theirs):
            name = name.replace(theirs, ours)
            break
    parts = name.replace(".layers.", ".").split(".")
    if parts[0] == "layers":
        parts[2] = PUBLIC_LAYER[parts[2]]
    elif parts[0] in ("position", "query_scale", "box_heads"):
        parts[-2] = str(2 * int(parts[-2]))
    return ".".join(parts)


@pytest.fixture(scope="module")
def recorded():
    """What the public program was given, and what it returned."""
    return load("relation/decoder")


@pytest.fixture(scope="module")
def public_decoder(recorded):
    """A decoder in float64 with the weights of the public program."""
    decoder = RelationDecoder(
        num_classes=5, num_layers=3, embed_dim=32, num_heads=4, num_levels=2, num_points=2, hidden_dim=64
    ).double()
    state = {our_name(name[8:]): x for name, x in recorded.items() if name.startswith("weights/")}
    state["relation.weight"] = state["relation.weight"].flatten(1)
    decoder.load_state_dict(state)
    return decoder


@pytest.mark.parametrize("case", ["plain", "masked", "skipped"])
def test_the_public_decoder(recorded, public_decoder, case):
    """Predictions and gradients, with and without a mask, and of a branch without the relation (`skip_relation`)."""
    inputs = {name: recorded[name].clone().requires_grad_() for name in ("query", "value")}
    mask = recorded["mask"] if case == "masked" else None
    queries = Queries(inputs["query"], recorded["references"].logit(), mask)
    memory = memory_of(recorded, inputs["value"])
    found = public_decoder(queries, memory, full_attention if case == "skipped" else None)
    public_decoder.zero_grad()
    sum((x.flatten() * torch.arange(x.numel()).cos()).sum() for x in found).backward()
    relation = public_decoder.relation
    own = {name: x.grad for name, x in inputs.items()}
    own |= {f"relation.pos_proj.0.{name}": x.grad for name, x in relation.named_parameters() if x.grad is not None}
    expected = {name.removeprefix(f"{case}/"): x for name, x in recorded.items() if name.startswith(f"{case}/")}
    own = {**found._asdict(), **{f"gradients/{name}": x for name, x in own.items()}}
    assert own.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(own[name], x.view_as(own[name]), rtol=0, atol=1e-6 * x.abs().max().item())


def test_a_checkpoint_of_dino_predicts_the_same():
    """What is new is reported as missing, and does nothing yet; a difference would show after a change of the bias."""
    plain, network = stir(tiny_network(num_layers=3)).eval(), relation_network().eval()
    report = load_weights(network, {"model": plain.state_dict()}, name="dino.pth")
    new = {"relation.weight", "relation.bias", *(f"query_scale.{i}.{x}" for i in (0, 2) for x in ("weight", "bias"))}
    assert set(report.missing) == {f"decoder.{name}" for name in new}
    assert not report.reinitialised
    assert not report.unexpected
    batch = random_batch(2)
    for a, b in zip(network(*batch).decoder, plain(*batch).decoder, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    nn.init.normal_(network.decoder.relation.weight)
    assert (network(*batch).decoder.boxes[0] - plain(*batch).decoder.boxes[0]).abs().max() < 1e-5  # the first layer
    assert (network(*batch).decoder.boxes[1] - plain(*batch).decoder.boxes[1]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_parameter_is_trained(dtype):
    """Denoising queries included; once the relation has left its start, a softmax sees its bias too."""
    network = stir(relation_network())
    targets = random_targets(2, 3)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        losses = default_criterion()(network(*random_batch(2), targets), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_the_relation_starts_with_a_gradient():
    network = relation_network()
    stir(network.decoder.box_heads)
    targets = random_targets(2, 3)
    sum(default_criterion()(network(*random_batch(2), targets), targets).values()).backward()
    assert network.decoder.relation.weight.grad.abs().max() > 1e-6


def test_matching_queries_see_no_denoising():
    """Their predictions are those without denoising queries: the bias opens no hole in the mask."""
    network = stir(relation_network()).eval()
    memory, queries = selected(network, *random_batch(2))
    count = queries.content.shape[1]
    extra = Queries(torch.randn(2, 8, 32), torch.randn(2, 8, 4))
    joined = Queries(*(torch.cat(pair, 1) for pair in zip(extra[:2], queries[:2], strict=True)))
    masked = joined._replace(attn_mask=denoising_mask(2, 4, count, torch.device("cpu")))
    assert masked.attn_mask.shape == (8 + count, 8 + count)
    alone = network.decoder(queries, memory)
    for found, expected in zip(network.decoder(masked, memory).split(8)[1], alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (network.decoder(joined, memory).split(8)[1].boxes - alone.boxes).abs().max() > 1e-4


def losses_and_gradients(network, seed=0):
    torch.manual_seed(seed)
    batch, targets = random_batch(2), random_targets(2, 3)
    network.zero_grad()
    losses = default_criterion()(network(*batch, targets), targets)
    sum(losses.values()).backward()
    return {**losses, **{name: p.grad.clone() for name, p in network.named_parameters()}}


def assert_same_step(found, expected, tolerance=1e-4):
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=tolerance, atol=tolerance * x.abs().max().item(), msg=name)


def test_activation_checkpointing_changes_nothing():
    network = stir(relation_network())
    expected = losses_and_gradients(network)
    saved = copy.deepcopy(network)
    apply_activation_checkpointing(saved.decoder, check_fn=lambda module: isinstance(module, DecoderLayer))
    found = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in losses_and_gradients(saved).items()}
    assert_same_step(found, expected)


def test_the_decoder_is_one_graph():
    """Without breaks, for any number of queries: the operator is one call."""
    network, graphs = stir(relation_network(num_layers=2)).eval(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(network.decoder, fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        memory, _ = selected(network, *random_batch(2))
        for count in (12, 9):
            queries = Queries(torch.randn(2, count, 32), torch.randn(2, count, 4))
            for found, expected in zip(compiled(queries, memory), network.decoder(queries, memory), strict=True):
                torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "tolerance"), [("aot_eager", 1e-4), ("inductor", 1e-3)])
def test_the_compiled_decoder_trains_as_it_is(backend, tolerance):
    torch._dynamo.reset()
    network = stir(relation_network(num_layers=2))
    compiled = copy.deepcopy(network)
    compiled.decoder.compile(backend=backend, fullgraph=True, dynamic=True)
    for seed in range(2):
        assert_same_step(losses_and_gradients(compiled, seed), losses_and_gradients(network, seed), tolerance)
    torch._dynamo.reset()


class Alone(nn.Module):
    """A decoder that takes and returns tensors."""

    def __init__(self, decoder, memory):
        super().__init__()
        self.decoder = decoder
        self.memory = memory

    def forward(self, content, box_logits, features):
        memory = self.memory._replace(
            features=features,
            padding_mask=None,
            valid_sizes=self.memory.valid_sizes[:1].expand(features.shape[0], -1, -1),
        )
        return tuple(self.decoder(Queries(content, box_logits), memory))


@pytest.mark.slow
def test_exported_to_onnx_for_any_number_of_queries_and_images():
    """Batch and queries stay open; the graph has standard operators only."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime")
    network = stir(relation_network(num_layers=2)).eval().requires_grad_(False)
    memory, queries = selected(network, *random_batch(2))
    alone = Alone(network.decoder, memory).eval()
    images, count = torch.export.Dim("images"), torch.export.Dim("queries")
    inputs = (*queries[:2], memory.features)
    sizes = ({0: images, 1: count}, {0: images, 1: count}, {0: images})
    with deform_attn_implementation("reference"):
        program = torch.onnx.export(
            alone, inputs, dynamo=True, dynamic_shapes=sizes, opset_version=20, optimize=False, verbose=False
        )
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for number, other in ((2, 12), (3, 7)):
        feed = [
            torch.randn(number, other, 32),
            torch.randn(number, other, 4),
            torch.randn(number, *memory.features[0].shape),
        ]
        results = session.run(
            None, dict(zip([x.name for x in session.get_inputs()], map(np.asarray, feed), strict=True))
        )
        for found, expected in zip(results, alone(*feed), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_single_layer_is_refused():
    with pytest.raises(ValueError, match="at least two decoder layers, not 1"):
        RelationDecoder(num_classes=3, num_layers=1, **SIZES)
