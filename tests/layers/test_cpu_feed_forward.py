"""The feed-forward network in parts that recompute half of their hidden state."""

import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dino.layers import cpu_feed_forward, feed_forward
from dino.layers.cpu_feed_forward import CpuFeedForward, _RecomputedFeedForward, replace_modules, use_cpu_feed_forward
from dino.layers.feed_forward import FeedForward
from dino.modeling import dino, neck, transformer


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 tokens."""
    monkeypatch.setattr(cpu_feed_forward, "_PART", 4)


@pytest.fixture
def arguments():
    """x (2, 9, 3): two whole parts and a rest; weights and biases of a hidden state of 5."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 3), (5, 3), (5,), (3, 5), (3,))
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def plain(x, weight1, bias1, weight2, bias2):
    return F.linear(F.relu(F.linear(x, weight1, bias1)), weight2, bias2)


def test_result_and_gradients(small_parts, arguments):
    pull = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result, expected = _RecomputedFeedForward.apply(*arguments), plain(*arguments)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, arguments, pull), torch.autograd.grad(expected, arguments, pull)
    )


def test_gradients_of_leading_dimensions_that_are_not_contiguous(small_parts, arguments):
    x = arguments[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    result = _RecomputedFeedForward.apply(x, *arguments[1:])
    (grad,) = torch.autograd.grad(result, x, torch.ones(2, 1, 1, dtype=torch.float64).expand(2, 9, 3))
    torch.testing.assert_close(grad, torch.autograd.grad(plain(*arguments).sum(), arguments[0])[0])


@pytest.mark.parametrize(("tokens", "kept"), [(4, 4), (9, 8), (16, 8)])
def test_module_keeps_half_of_the_hidden_state_of_many_tokens(small_parts, tokens, kept):
    module = CpuFeedForward(8, 21)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        module(torch.randn(1, tokens, 8, requires_grad=True))
    parameters = {p.data_ptr() for p in module.parameters()}
    hidden = [t for place, t in saved.items() if t.shape[-1] == 21 and place not in parameters]
    assert sum(t.numel() for t in hidden) == kept * 21


def test_module_in_parts_equals_the_plain_one(small_parts):
    torch.manual_seed(0)
    module = CpuFeedForward(8, 21)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(module(x), FeedForward.forward(module, x))
    with torch.no_grad():
        torch.testing.assert_close(module(x), FeedForward.forward(module, x))


def test_autocast_decides_the_precision(small_parts):
    module = CpuFeedForward(8, 21)
    seen = set()
    module.linear1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 9, 8)).sum().backward()
    assert seen == {torch.bfloat16}


class Twice(nn.Module):
    """One feed-forward network in two places, and another one."""

    def __init__(self):
        super().__init__()
        self.first = FeedForward(8, 21)
        self.layers = nn.ModuleList([self.first, FeedForward(8, 21)])

    def forward(self, x):
        return self.layers[1](self.layers[0](self.first(x)))


def test_replaced_modules_hold_the_very_parameters(small_parts):
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 9, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, parameters, expected = list(model.state_dict()), list(model.parameters()), model(x)
    assert use_cpu_feed_forward(model) == 2
    assert [type(module) for module in (model.first, *model.layers)] == [CpuFeedForward] * 3
    assert model.layers[0] is model.first
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), expected)
    assert use_cpu_feed_forward(model) == 0


def test_replaced_modules_keep_mode_and_hooks():
    model, seen = nn.Sequential(FeedForward(8, 21)).eval(), []
    hook = model[0].register_forward_hook(lambda *call: seen.append(type(call[0])))
    use_cpu_feed_forward(model)
    assert not model[0].training
    model(torch.zeros(1, 2, 8))
    hook.remove()
    model(torch.zeros(1, 2, 8))
    assert seen == [CpuFeedForward]


def test_a_copy_has_weights_of_its_own(small_parts):
    model, x = nn.Sequential(FeedForward(8, 21)), torch.randn(1, 9, 8)
    use_cpu_feed_forward(model)
    other = copy.deepcopy(model)
    expected = other(x)
    with torch.no_grad():
        model[0].linear2.weight.zero_()
    assert torch.equal(other(x), expected)
    assert not torch.equal(model(x), expected)


def test_gradients_under_activation_checkpointing(small_parts):
    torch.manual_seed(0)
    model, x = nn.Sequential(FeedForward(8, 21)), torch.randn(1, 9, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    use_cpu_feed_forward(model)
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)


def test_a_compiler_sees_the_plain_operations(small_parts):
    model, x, seen = nn.Sequential(FeedForward(8, 21)), torch.randn(1, 9, 8), []
    use_cpu_feed_forward(model)

    def note(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.testing.assert_close(torch.compile(model, backend=note)(x), model(x))
    assert seen
    assert not any("split" in name or "autograd" in name for name in seen)


@pytest.mark.parametrize("module", [dino, transformer, neck, feed_forward], ids=lambda module: module.__name__)
def test_the_network_asks_for_no_device(module):
    """Devices, autocast and compilers are the business of modules that replace its own."""
    asks = re.compile(r"autocast|is_compiling|device\.type|is_cpu|is_cuda")
    assert asks.search(inspect.getsource(cpu_feed_forward))
    assert not asks.findall(inspect.getsource(module))


def test_the_model_itself_is_not_replaced():
    model = FeedForward(8, 21)
    assert use_cpu_feed_forward(model) == 0
    assert replace_modules(model, lambda module: None) == 0
