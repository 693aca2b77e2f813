import pytest
import torch
from torch import nn

from dino.layers import HungarianMatcher, SetCriterion
from dino.layers.class_loss import IoUAwareLoss
from dino.modeling import Decoder, QuerySelection
from dino.modeling.transformer import full_attention
from dino.modeling.variants import (
    CombinedCriterion,
    HybridBranch,
    LearnedQueries,
    LookForwardOnce,
    OneToManyCriterion,
    PatternSelection,
    RankedCriterion,
    SecondPass,
    SharedHybridBranch,
    ThresholdMatcher,
)
from dino.structures import Queries, concatenate
from dino.utils.files import UserError

from ...descendants.branches import load, memory_of
from ...tiny import random_batch, random_targets, tiny_network

SIZES = {"embed_dim": 32, "num_heads": 4, "num_levels": 4, "num_points": 2, "hidden_dim": 16}
SELECTION = {"num_queries": 12, "num_classes": 3, "embed_dim": 32}
MATCHER = HungarianMatcher()
BRANCHES = {
    "shared": lambda: (SharedHybridBranch(num_queries=20, embed_dim=32), OneToManyCriterion(matcher=MATCHER, copies=3)),
    "hybrid": lambda: (
        HybridBranch(num_queries=20, num_classes=3, embed_dim=32),
        OneToManyCriterion(matcher=MATCHER, copies=3),
    ),
    "pass": lambda: (
        SecondPass(),
        RankedCriterion(matcher=ThresholdMatcher(), class_loss=IoUAwareLoss(), objects_factor=3),
    ),
}


def build(name, **options):
    """A tiny network with a branch, no matrix of zeros in it, and its criterion."""
    torch.manual_seed(3)
    branch, criterion = BRANCHES[name]()
    network = tiny_network(branches={name: branch}, **options)
    for parameter in network.parameters():
        if parameter.dim() == 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network, CombinedCriterion(criterion=SetCriterion(matcher=MATCHER), branches={name: criterion})


def run(network, targets=None):
    torch.manual_seed(4)
    return network(*random_batch(2), targets)


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("training", [True, False])
def test_main_predictions_stay_the_same(name, training):
    """To the bit, in training and at inference, where no branch runs."""
    network, _ = build(name)
    calls = []
    network.branches[name].register_forward_hook(lambda *_: calls.append(name))
    targets = random_targets(2, 3) if training else None
    with_branch = run(network, targets)
    assert calls == ([name] if training else [])
    assert list(with_branch.extra or {}) == calls
    del network.branches[name]
    alone = run(network, targets)
    assert not alone.extra
    for ours, theirs in zip(with_branch[:2], alone[:2], strict=True):
        assert all(map(torch.equal, ours, theirs))
    if training:
        assert all(map(torch.equal, with_branch.denoising.predictions, alone.denoising.predictions))


@pytest.mark.parametrize("name", BRANCHES)
def test_every_parameter_is_trained(name):
    """Also of shared heads by the branch alone; with objects, without, and in half precision."""
    network, criterion = build(name)
    for counts, dtype in (((3, 2), None), ((0, 0), None), ((15, 0), torch.bfloat16)):
        targets = random_targets(*counts)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            losses = criterion(run(network, targets), targets)
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()
        idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not idle
    targets = random_targets(3, 2)
    assert not untrained(network, criterion, targets, "")
    left = {n for n in untrained(network, criterion, targets, f"_{name}") if not n.startswith(MAIN_ONLY)}
    first_only = ("decoder.layers.1.self_attention.", "decoder.layers.1.self_norm.") if name == "pass" else ()
    assert {n for n in left if not n.startswith(first_only)} == set()
    assert bool(left) == (name == "pass")


MAIN_ONLY = ("query_selection.", "denoising.")  # what a branch alone need not train


def untrained(network, criterion, targets, ending):
    """Names of the parameters that the losses with this ending do not reach."""
    network.zero_grad()
    losses = criterion(run(network, targets), targets)
    sum(loss for name, loss in losses.items() if name.endswith(ending)).backward()
    return {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}


# Hybrid branches


def some_memory(network):
    images, padding = random_batch(2, 96, 96)
    return network.encoder(network.tokenize(network.neck(images), padding))


@pytest.mark.parametrize("kind", [QuerySelection, PatternSelection])
def test_next_boxes_continue_the_ranking(kind):
    """The same boxes, in the same order, as one selection of more queries; as many as there are tokens."""
    network, _ = build("shared")
    memory = some_memory(network)
    small = kind(**{**SELECTION, "num_queries": 12})
    large = QuerySelection(**{**SELECTION, "num_queries": 1000})
    heads = {k: v for k, v in small.state_dict().items() if not k.startswith(("content", "patterns"))}
    large.load_state_dict(heads, strict=False)
    everything = large(memory)[0].box_logits
    tokens = everything.shape[1]
    assert tokens == memory.features.shape[1] > 40
    first = small(memory)[0].box_logits[:, :12]
    usable = small.anchors(memory)[1].sum(1).min()
    assert usable > 12 + 20  # the scores of these differ
    torch.testing.assert_close(torch.cat([first, small.next_boxes(memory, 20)], 1), everything[:, :32])
    assert small.next_boxes(memory, 1000).shape == (2, tokens - 12, 4)


def test_no_token_is_taken_twice():
    """Where all but a few tokens share the lowest score, too: each box of a token occurs once."""
    network, _ = build("shared")
    memory = some_memory(network)
    selection = QuerySelection(**{**SELECTION, "num_queries": 30})
    boxes = torch.arange(memory.features.shape[1] * 4.0).view(1, -1, 4).expand(2, -1, -1)
    selection.anchors = lambda memory: (boxes, (torch.arange(boxes.shape[1]) < 5).expand(2, -1))
    queries, _ = selection(memory)
    found = torch.cat([queries.box_logits, selection.next_boxes(memory, 1000)], 1)
    for image in found:
        assert torch.equal(image[:, 0].sort().values, boxes[0, :, 0])


def test_selection_of_the_public_program():
    """Its boxes of both groups, best first, when it scores each token by the first class."""
    values = load("hybrid/selection")
    memory = memory_of(values, torch.cat([values["logits"], values["deltas"]], -1))
    for first in (0, 2, 6):
        selection = QuerySelection(num_queries=first, num_classes=1, embed_dim=9).double()
        selection.project, selection.class_head, selection.box_head = nn.Identity(), Part(0, 1), Part(5, 9)
        queries, _ = selection(memory)
        boxes = torch.cat([queries.box_logits, selection.next_boxes(memory, 6 - first)], 1).sigmoid()
        torch.testing.assert_close(boxes, values["references"], rtol=0, atol=1e-6)


class Part(nn.Module):
    """Some of the channels."""

    def __init__(self, start, stop):
        super().__init__()
        self.part = slice(start, stop)

    def forward(self, x):
        return x[..., self.part]


def test_a_joint_run_under_the_public_mask_is_the_same():
    """H-DETR decodes both groups together, under a mask; a branch decodes its own alone."""
    network, _ = build("shared")
    memory, mask = some_memory(network), load("hybrid")["mask"]
    assert torch.equal(mask, torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)) == 0)
    one, many = (Queries(torch.randn(2, count, 32), torch.randn(2, count, 4)) for count in (3, 5))
    joint = network.decoder(concatenate(one._replace(attn_mask=mask), many), memory)
    for group, together in zip((one, many), joint.split(3), strict=True):
        torch.testing.assert_close(network.decoder(group, memory, full_attention), together)


@pytest.mark.parametrize(("queries", "expected"), [(21, 0), (18, 3)])
def test_an_image_with_few_tokens_gets_few_queries(queries, expected):
    """64 x 64 pixels have 16 + 4 + 1 tokens in three levels."""
    network, criterion = build("shared", num_levels=3)
    network.query_selection.num_queries = queries
    network.query_selection.content = nn.Embedding(queries, 32)
    targets = random_targets(2, 3)
    outputs = run(network, targets)
    assert outputs.extra["shared"].decoder.boxes.shape == (2, 2, expected, 4)
    losses = criterion(outputs, targets)
    assert all(loss.isfinite() for loss in losses.values())
    if not expected:
        assert not any(loss for name, loss in losses.items() if name.endswith("_shared"))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_own_selection_of_a_hybrid_branch():
    """It ranks and refines the features of the main selection with its own heads, and proposes."""
    network, _ = build("hybrid")
    branch, memory = network.branches["hybrid"], some_memory(network)
    queries, _ = network.query_selection(memory)
    outputs = branch(None, queries, memory, network.query_selection, network.decoder)
    own = QuerySelection(**{**SELECTION, "num_queries": 20})
    own.load_state_dict({**network.query_selection.state_dict(), **branch.state_dict()})
    expected, proposals = own(memory)
    assert all(map(torch.equal, outputs.proposals, proposals))
    assert all(map(torch.equal, outputs.decoder, network.decoder(expected, memory)))


# Second pass


def test_second_pass_by_hand():
    """The first layer is that of the main pass to the bit, later ones have no self-attention; denoising comes along."""
    network, _ = build("pass", num_layers=3)
    decoder, targets = network.decoder, random_targets(2, 3)
    calls = []
    handle = decoder.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    outputs = run(network, targets)
    handle.remove()
    (queries, memory), main = calls[0]
    second = outputs.extra["pass"]
    found = [torch.cat(pair, 2) for pair in zip(second.denoising.predictions, second.decoder, strict=True)]
    for ours, theirs in zip(found, main, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert not torch.allclose(ours[1], theirs[1])
    for layer in decoder.layers[1:]:
        layer.self_attention, layer.self_norm = Nothing(), nn.Identity()
    assert all(map(torch.equal, found, decoder(queries, memory)))
    assert second.denoising.num_groups == outputs.denoising.num_groups
    assert second.proposals.boxes.shape == (0, *second.decoder.boxes.shape[1:])


class Nothing(nn.Module):
    """Self-attention that adds nothing."""

    def forward(self, x, position, attend):
        return torch.zeros_like(x)


class Fixed(nn.Module):
    """The same result for everything."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, *_):
        return self.result


PUBLIC = {
    "self_attn": "self_attention",
    "cross_attn": "cross_attention",
    "norm2": "self_norm",
    "norm1": "cross_norm",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
    "norm3": "feed_forward.norm",
}


def public_decoder(values):
    """Our decoder with the recorded weights; its class logits are the states."""
    decoder = LookForwardOnce(
        num_classes=1, num_layers=3, embed_dim=16, num_heads=4, num_levels=2, num_points=2, hidden_dim=32
    ).double()
    own = {}
    for name, value in values.items():
        kind, _, name = name.partition("/")
        part, *rest = name.split(".")
        if kind == "weights" and part == "layers":
            own[".".join([part, rest[0], PUBLIC[rest[1]], *rest[2:]])] = value
        elif kind == "weights":
            own[f"box_heads.{rest[0]}.{2 * int(rest[2])}.{rest[3]}"] = value
    decoder.load_state_dict(own, strict=False)
    assert {name.split(".")[0] for name, _ in decoder.named_parameters() if name not in own} == {
        "class_heads",
        "position",
        "norm",
    }
    decoder.norm, decoder.class_heads = nn.Identity(), nn.ModuleList(nn.Identity() for _ in range(3))
    return decoder


def test_both_passes_of_the_public_program():
    """States, boxes and gradients of both decoders of DAC-DETR, with its position codes, equal in all layers."""
    values = load("dac/decoder")
    query, position, value = (values[name].requires_grad_() for name in ("query", "position", "value"))
    decoder = public_decoder(values)
    decoder.position = Fixed(position)
    memory = memory_of(values, value)
    queries = Queries(query, values["references"].logit(), values["mask"])
    main = decoder(queries, memory)
    denoising = type("Denoising", (), {"queries": Queries(query[:, :4], query), "targets": [], "num_groups": 2})
    second = SecondPass()(denoising, queries, memory, None, decoder)
    c_states, c_boxes = (torch.cat(x, 2) for x in zip(second.denoising.predictions, second.decoder, strict=True))
    found = {"o_states": main.logits, "o_boxes": main.boxes, "c_states": c_states, "c_boxes": c_boxes}
    for name, x in found.items():
        torch.testing.assert_close(x, values[name], rtol=0, atol=2e-6, msg=name)
    sum((x.flatten() * torch.arange(x.numel()).cos()).sum() for x in found.values()).backward()
    layers = decoder.layers
    gradients = {"query": query, "position": position, "value": value}
    gradients["layers.0.norm1.weight"] = layers[0].cross_norm.weight
    gradients["layers.1.cross_attn.value_proj.bias"] = layers[1].cross_attention.value_proj.bias
    gradients["layers.2.linear2.weight"] = layers[2].feed_forward.linear2.weight
    for name, x in gradients.items():
        expected = values[f"gradients/{name}"]
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=name)


def test_a_second_pass_keeps_the_decoders_own_first_layer():
    """Whatever the interaction of the decoder is."""

    class Scaled(Decoder):
        def interaction(self, mask, boxes):
            attend = full_attention(mask, boxes)
            return lambda q, k, v: attend(3 * q, k, v)

    network, _ = build("pass")
    own = Scaled(num_classes=3, num_layers=2, **SIZES)
    own.load_state_dict(network.decoder.state_dict())
    network.decoder = own
    outputs = run(network, random_targets(2, 3))
    assert torch.equal(outputs.extra["pass"].decoder.logits[0], outputs.decoder.logits[0])
    assert not torch.equal(outputs.extra["pass"].decoder.logits[1], outputs.decoder.logits[1])


# Refusals


def rebuilt(name, **parts):
    """The tiny network with other parts, checked as a new one is."""
    network = tiny_network()
    return type(network)(**{**dict(network.named_children()), **parts, "branches": {name: BRANCHES[name]()[0]}})


class OldDecoder(nn.Module):
    """A decoder of two arguments, as in earlier versions."""

    def forward(self, queries, memory):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "why"), [("shared", "LearnedQueries ranks no tokens"), ("hybrid", "LearnedQueries makes no features")]
)
def test_a_selection_without_tokens_is_refused(name, why):
    with pytest.raises(UserError, match=why):
        rebuilt(name, query_selection=LearnedQueries(**SELECTION))
    rebuilt("pass", query_selection=LearnedQueries(**SELECTION))
    rebuilt(name, query_selection=PatternSelection(**SELECTION))


@pytest.mark.parametrize("name", BRANCHES)
def test_a_decoder_without_interaction_is_refused(name):
    with pytest.raises(UserError, match="OldDecoder takes no `interaction`"):
        rebuilt(name, decoder=OldDecoder())


def test_a_branch_of_ones_own_needs_no_check():
    network = tiny_network(branches={"own": nn.Identity()})
    assert list(network.branches) == ["own"]


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (lambda: SharedHybridBranch(num_queries=5), "5 queries of 256 channels, but at least one of 32"),
        (lambda: SharedHybridBranch(num_queries=0, embed_dim=32), "0 queries of 32 channels"),
        (lambda: HybridBranch(num_queries=5, num_classes=3, embed_dim=16), "5 queries of 16 channels"),
        (lambda: HybridBranch(num_queries=5, num_classes=80, embed_dim=32), "80 classes, but the decoder 3"),
    ],
)
def test_branches_of_another_size_are_refused(branch, message):
    network = tiny_network()
    with pytest.raises(UserError, match=message):
        branch().check(network.query_selection, network.decoder)
