"""Programs that record, count or transform: none ends in an error of torch, or keeps later calls from the operator."""

import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dino.layers import MultiScaleDeformableAttention, deform_attn_implementation
from dino.layers.ops import operator
from dino.layers.relation import PositionRelation

from . import compiled

CPU = torch.device("cpu")
SHAPES = [(4, 5), (2, 3)]
PREFIX = "deform_attn"


@pytest.fixture(autouse=True)
def unknown(tmp_path_factory, monkeypatch):
    """The compiled operator is there, nothing is chosen, and nothing is known about any device."""
    monkeypatch.setattr(operator, "FOLDER", compiled.folder_of_operator(tmp_path_factory.mktemp("operator")))
    monkeypatch.setattr(operator, "_verdicts", {})
    monkeypatch.setattr(operator, "_warned", set())
    monkeypatch.delenv(operator.VARIABLE, raising=False)


class Attention(nn.Module):
    """The module with tensors alone for arguments."""

    def __init__(self):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=3)
        nn.init.normal_(self.attention.sampling_offsets.weight)
        nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query, reference, value, padding):
        return self.attention(query, reference, value, padding, SHAPES)


def example():
    return torch.randn(2, 5, 16), torch.rand(2, 5, 2, 4), torch.randn(2, 26, 16), torch.rand(2, 26) < 0.2


class Names(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def uses_operator(network, inputs):
    with Names() as names, torch.no_grad():
        network(*inputs)
    return any(name.startswith(PREFIX) for name in names.seen)


def jit(network, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, inputs)
    assert "dino::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs), network(*inputs))


def jit_without_gradients(network, inputs):
    with torch.no_grad():
        jit(network, inputs)


def fvcore(network, inputs):
    counts = pytest.importorskip("fvcore.nn").FlopCountAnalysis(network, inputs)
    assert counts.unsupported_ops_warnings(False).by_operator()["grid_sampler"] == 4 * 2 * 5 * 16 * 2 * 3


def counter(network, inputs):
    for gradients in (True, False):
        with FlopCounterMode(display=False) as counts, torch.set_grad_enabled(gradients):
            network(*inputs)
        assert counts.get_total_flops() > 0


def profiler(network, inputs):
    with torch.profiler.profile(with_flops=True, record_shapes=True) as profile:
        network(*inputs)
    assert any(PREFIX in event.key for event in profile.key_averages())


def exported(strict):
    def run(network, inputs):
        program = torch.export.export(network, inputs, strict=strict)
        torch.testing.assert_close(program.module()(*inputs), network(*inputs))

    return run


def fx(mode):
    def run(network, inputs):
        with torch.no_grad():
            graph = make_fx(network, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
            torch.testing.assert_close(graph(*inputs), network(*inputs))

    return run


def fake(network, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert network(*map(mode.from_tensor, inputs)).shape == (2, 5, 16)


def hooks(network, inputs):
    seen = []
    handles = [module.register_forward_hook(lambda *values: seen.append(values)) for module in network.modules()]
    network(*inputs)
    for handle in handles:
        handle.remove()
    assert len(seen) == 6


def compiler(network, inputs):
    torch.testing.assert_close(torch.compile(network, backend="eager")(*inputs), network(*inputs))
    torch._dynamo.reset()


def gradient(network, inputs):
    query, *rest = inputs
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(leaf, *rest).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda q: network(q, *rest).sum())(query), expected)


def forward_derivative(network, inputs):
    """The operator has no rule for it; a derivative of 0 would be wrong."""
    query, reference, value, padding = (x.double() if x.is_floating_point() else x for x in inputs)
    network = Attention().double()
    direction = torch.randn_like(query)
    _, actual = torch.func.jvp(lambda q: network(q, reference, value, padding), (query,), (direction,))
    ahead, behind = (network(query + step * direction, reference, value, padding) for step in (1e-6, -1e-6))
    torch.testing.assert_close(actual, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


def mapped(network, inputs):
    query, reference, value, padding = inputs
    several = torch.stack([query, query + 1])
    actual = torch.vmap(lambda q: network(q, reference, value, padding))(several)
    torch.testing.assert_close(actual, torch.stack([network(q, reference, value, padding) for q in several]))


TRACERS = {
    "jit.trace": jit,
    "jit.trace without gradients": jit_without_gradients,
    "fvcore": fvcore,
    "flop counter": counter,
    "profiler": profiler,
    "export": exported(False),
    "export, strict": exported(True),
    "make_fx": fx("real"),
    "make_fx, fake": fx("fake"),
    "make_fx, symbolic": fx("symbolic"),
    "fake tensors": fake,
    "hooks": hooks,
    "compile": compiler,
    "func.grad": gradient,
    "func.jvp": forward_derivative,
    "vmap": mapped,
}


@pytest.mark.parametrize("first", [True, False], ids=["first use", "later"])
@pytest.mark.parametrize("name", TRACERS)
def test_tracers_leave_the_operator_as_it_was(name, first):
    network, inputs = Attention(), example()
    if not first:
        assert uses_operator(network, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="deform_attn runs as plain PyTorch")
        TRACERS[name](network, inputs)
        assert uses_operator(network, inputs)
    assert operator._verdicts[CPU].usable


def test_one_thread_traces_while_others_predict():
    network, inputs = Attention(), example()
    with deform_attn_implementation("reference"), torch.no_grad():
        expected = network(*inputs)
    together = threading.Barrier(5)

    def predict(_):
        together.wait()
        with torch.no_grad():
            return [network(*inputs) for _ in range(20)]

    def trace():
        together.wait()
        for _ in range(3):
            jit_without_gradients(network, inputs)

    with ThreadPoolExecutor(5) as pool:
        tracing = pool.submit(trace)
        results = list(pool.map(predict, range(4)))
        tracing.result()
    for result in itertools.chain(*results):
        torch.testing.assert_close(result, expected)
    assert uses_operator(network, inputs)


def test_where_the_compiled_form_was_asked_for():
    """Tracers then end in one clear error."""
    network, inputs = Attention(), example()
    query, *rest = inputs
    with deform_attn_implementation("compiled"):
        with pytest.raises(RuntimeError, match=r"asked for, but torch\.jit\.trace can't record it .* use auto"):
            torch.jit.trace(network, inputs)
        with pytest.raises(NotImplementedError, match=r"asked for, but torch\.func can't transform it: use auto"):
            torch.func.grad(lambda q: network(q, *rest).sum())(query)
        assert uses_operator(network, inputs)


def test_tensors_without_data():
    network = Attention().to("meta")
    assert network(*(x.to("meta") for x in example())).shape == (2, 5, 16)


def test_tracers_of_the_relation():
    """Its operator is for the computation itself."""
    relation, q, boxes = PositionRelation(2), torch.randn(1, 2, 6, 4), torch.rand(1, 6, 4)
    nn.init.normal_(relation.weight)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.relation = relation

        def forward(self, q, boxes):
            return self.relation(q, q, q, mask=None, source=boxes, target=boxes)

    network, leaf = Wrapper(), q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(leaf, boxes).sum(), leaf)
    actual = torch.func.grad(lambda q: network(q, boxes).sum())(q)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, (q, boxes))
    assert "dino::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(q, boxes), network(q, boxes), rtol=1e-3, atol=1e-3)
    with Names() as names, torch.no_grad():
        network(q, boxes)
    assert any(name.startswith("relation_attention") for name in names.seen)
