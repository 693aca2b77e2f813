"""The feed-forward network that forgets half of its hidden state."""

import pytest
import torch
import torch.nn.functional as F

from dino.layers import feed_forward
from dino.modeling import transformer


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 tokens."""
    monkeypatch.setattr(feed_forward, "PART", 4)
    monkeypatch.setattr(transformer, "PART", 4)


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
    result, expected = feed_forward.RecomputedFeedForward.apply(*arguments), plain(*arguments)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, arguments, pull), torch.autograd.grad(expected, arguments, pull)
    )


def test_gradients_of_leading_dimensions_that_are_not_contiguous(small_parts, arguments):
    x = arguments[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    result = feed_forward.RecomputedFeedForward.apply(x, *arguments[1:])
    (grad,) = torch.autograd.grad(result, x, torch.ones(2, 1, 1, dtype=torch.float64).expand(2, 9, 3))
    torch.testing.assert_close(grad, torch.autograd.grad(plain(*arguments).sum(), arguments[0])[0])


@pytest.mark.parametrize(("tokens", "kept"), [(4, 4), (9, 8), (16, 8)])
def test_module_keeps_half_of_the_hidden_state_of_many_tokens(small_parts, tokens, kept):
    module = transformer.FeedForward(8, 21)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        module(torch.randn(1, tokens, 8, requires_grad=True))
    parameters = {p.data_ptr() for p in module.parameters()}
    hidden = [t for place, t in saved.items() if t.shape[-1] == 21 and place not in parameters]
    assert sum(t.numel() for t in hidden) == kept * 21


def test_module_in_parts_equals_module_in_one_go(small_parts):
    torch.manual_seed(0)
    module = transformer.FeedForward(8, 21)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(module(x), module.part(x))
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.part(x))


def test_autocast_decides_the_precision(small_parts):
    module = transformer.FeedForward(8, 21)
    seen = set()
    module.linear1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 9, 8)).sum().backward()
    assert seen == {torch.bfloat16}
