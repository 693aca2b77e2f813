"""torch.compile: the parts are one graph each, and one graph serves images of any size."""

import copy

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from dino.modeling.compile import PARTS, compile_network
from dino.modeling.variants import CombinedCriterion, HybridBranch, OneToManyCriterion, SecondPass, SharedHybridBranch

from ..tiny import default_criterion, random_batch, random_targets, tiny_network


@pytest.mark.parametrize("part", ["neck", "encoder", "decoder"])
def test_one_graph_for_all_sizes(part):
    """`fullgraph` refuses a break in the graph; other sizes must not make another graph."""
    model, graphs = tiny_network(num_layers=1).eval(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.get_submodule(part), fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        for height, width in ((136, 200), (200, 136), (264, 328)):
            inputs = inputs_of(model, part, *random_batch(2, height, width))
            torch.testing.assert_close(compiled(*inputs), model.get_submodule(part)(*inputs))
    assert len(graphs) == 1


def inputs_of(model, part, images, padding):
    """What `part` is called with for a batch."""
    if part == "neck":
        return (images,)
    tokens = model.tokenize(model.neck(images), padding)
    if part == "encoder":
        return (tokens,)
    memory = model.encoder(tokens)
    return (model.query_selection(memory)[0], memory)


class Counted:
    """A backend of `torch.compile` that counts the graphs it gets."""

    def __init__(self, name):
        self.compile = lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph, inputs, **options):
        self.graphs += 1
        return self.compile(graph, inputs, **options)


@pytest.fixture
def fresh():
    """Nothing that was compiled before is used, and the limits are those of a new process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def stirred_network(**options):
    model = tiny_network(num_layers=1, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def branches():
    """One of each kind."""
    selection = {"num_queries": 20, "embed_dim": 32}
    return {
        "shared": SharedHybridBranch(**selection),
        "hybrid": HybridBranch(num_classes=3, **selection),
        "pass": SecondPass(),
    }


def criterion_of(model):
    """With losses for all branches."""
    parts = {name: OneToManyCriterion(matcher=default_criterion().matcher, copies=2) for name in model.branches}
    return CombinedCriterion(criterion=default_criterion(), branches=parts)


def step(model, batch, targets):
    """Losses and gradients of a step of training, always with the same noise."""
    torch.manual_seed(1)
    model.zero_grad()
    losses = criterion_of(model)(model(*batch, targets), targets)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_same_steps(compiled, plain, sizes, **tolerances):
    """Images of several sizes, with several numbers of objects, hence of denoising queries; one batch without any."""
    for (height, width), counts in zip(sizes, ((2, 3), (1, 4), (0, 0), (6, 1)), strict=False):
        batch, targets = random_batch(2, height, width), random_targets(*counts)
        for ours, theirs in zip(step(compiled, batch, targets), step(plain, batch, targets), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, msg=name, **tolerances)


SIZES = ((136, 200), (200, 136), (264, 328), (140, 250))


def test_a_compiled_network_trains_as_it_is(fresh):
    """Sizes and numbers of objects make no new graphs. (PyTorch can begin a part twice.)"""
    plain = stirred_network(num_levels=2)
    compiled, backend = copy.deepcopy(plain), Counted("aot_eager")
    assert compile_network(compiled, backend=backend, fullgraph=True) is compiled
    assert_same_steps(compiled, plain, SIZES[:1], rtol=1e-4, atol=1e-6)
    graphs = backend.graphs
    assert_same_steps(compiled, plain, SIZES[1:], rtol=1e-4, atol=1e-6)
    assert len(PARTS) <= graphs == backend.graphs <= 2 * len(PARTS)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert copy.deepcopy(compiled).decoder._compiled_call_impl is None


@pytest.mark.slow
def test_compiled_code_trains_as_the_network_with_branches(fresh):
    """Each way in which queries read each other has its own graph of the decoder, once."""
    plain = stirred_network(branches=branches())
    compiled = compile_network(copy.deepcopy(plain), fullgraph=True)
    graphs = []
    for sizes in (SIZES[:1], SIZES[1:]):
        assert_same_steps(compiled, plain, sizes, rtol=1e-3, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [len(PARTS) + 2] * 2


@pytest.mark.slow
def test_compiled_code_trains_as_the_network(fresh):
    """PyTorch's own compiler, on the CPU."""
    plain = stirred_network()
    compiled = compile_network(copy.deepcopy(plain), fullgraph=True)
    graphs = []
    for sizes in (SIZES[:1], SIZES[1:]):
        assert_same_steps(compiled, plain, sizes, rtol=1e-3, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [len(PARTS)] * 2


def test_the_limit_of_graphs_is_raised_never_lowered(fresh, monkeypatch):
    network = tiny_network()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    compile_network(network)
    assert torch._dynamo.config.recompile_limit == 64
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 100)
    compile_network(network)
    assert torch._dynamo.config.recompile_limit == 100
