"""Attention with the position relation: against the public program's numbers, and against the same without chunks."""

import io

import pytest
import torch
import torch.nn.functional as F

from dino.layers import relation
from dino.layers.relation import PositionRelation

from ..descendants.branches import load
from ..tiny import random_boxes


def random_relation(num_heads, dtype=torch.float32):
    module = PositionRelation(num_heads).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def random_inputs(images=2, heads=3, queries=21, dtype=torch.float64, masked=True):
    """q, k, v with gradients, the mask and both sets of boxes."""
    q, k, v = (torch.randn(images, heads, queries, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    hidden = torch.rand(queries, queries) < 0.4
    mask = torch.zeros(queries, queries, dtype=dtype).masked_fill(hidden.fill_diagonal_(False), -torch.inf)
    boxes = {name: random_boxes(images, queries).to(dtype) for name in ("source", "target")}
    return (q, k, v), {"mask": mask if masked else None, **boxes}


def naive_bias(module, source, target):
    """Word for word from the paper: all codes (B, Q, Q, 64), then a linear layer and a ReLU."""
    source, target, eps = source[:, :, None], target[:, None], 1e-5
    distances = [(source - target)[..., i].abs() / (source[..., 2 + i] + eps) + 1 for i in (0, 1)]
    ratios = [(source[..., i] + eps) / (target[..., i] + eps) for i in (2, 3)]
    codes = []
    for number in torch.stack([*distances, *ratios], -1).log().unbind(-1):
        for frequency in range(8):
            angle = 100 * number / 10000 ** (frequency / 8)
            codes += [angle.sin(), angle.cos()]
    return F.linear(torch.stack(codes, -1), module.weight, module.bias).relu().permute(0, 3, 1, 2)


def naive(module, q, k, v, *, mask, source, target):
    bias = naive_bias(module, source, target)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if mask is None else bias + mask)


def with_gradients(attend, module, inputs, options):
    """Result and gradients of q, k, v and both parameters."""
    output = attend(*inputs, **options)
    scalar = (output * torch.arange(output.numel(), device=output.device).cos().view(output.shape)).sum()
    return output, *torch.autograd.grad(scalar, [*inputs, *module.parameters()])


def assert_near(found, expected, tolerance):
    """Relative to the largest number of each tensor."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_bias_of_the_public_program(dtype, tolerance):
    """Recorded in float64. The public program itself differs by 2e-5 in float32."""
    known = {name: x.to(dtype) for name, x in load("relation/bias").items()}
    module = PositionRelation(8).to(dtype)
    module.weight.data = known["weights/pos_proj.0.weight"].flatten(1)
    module.bias.data = known["weights/pos_proj.0.bias"]
    bias = module.pair_bias(known["source"], known["target"])
    (bias * torch.arange(bias.numel()).cos().view(bias.shape)).sum().backward()
    expected = [known["bias"], known["gradients/pos_proj.0.weight"].flatten(1), known["gradients/pos_proj.0.bias"]]
    assert_near([bias, module.weight.grad, module.bias.grad], expected, tolerance)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_rows_at_a_time_are_all_rows(masked, rows, monkeypatch):
    """21 rows: with 2 or 5 at a time, the last chunk is smaller."""
    inputs, options = random_inputs(masked=masked)
    monkeypatch.setitem(relation._CHUNK, "cpu", rows * 2 * 21 * 32)
    assert len(list(relation._chunks(torch.empty(2, 4, 21, 1), torch.empty(2, 4, 1, 21)))) == -(-21 // rows)
    module = random_relation(3, torch.float64)
    found = with_gradients(module, module, inputs, options)
    expected = with_gradients(lambda *x, **y: naive(module, *x, **y), module, inputs, options)
    assert_near(found, expected, 1e-9)


def test_gradients_by_differences():
    inputs, options = random_inputs(1, 2, 4)
    module = random_relation(2, torch.float64)

    def attend(q, k, v, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(module, parameters, (q, k, v), options)

    assert torch.autograd.gradcheck(attend, (*inputs, *module.parameters()))


@pytest.mark.parametrize("bias", [0.0, -1.0, 2.5])
def test_a_constant_bias_is_plain_attention(bias):
    """As at the start. The weight has a gradient where the constant is positive, the boxes never have one."""
    inputs, options = random_inputs()
    options["source"].requires_grad_()
    module = PositionRelation(3).double()
    torch.nn.init.constant_(module.bias, bias)
    output = module(*inputs, **options)
    plain = F.scaled_dot_product_attention(*inputs, attn_mask=options["mask"])
    torch.testing.assert_close(output, plain)
    output.square().sum().backward()
    assert bool(module.weight.grad.abs().sum() > 1e-3) == (bias > 0)
    assert options["source"].grad is None


def test_fresh_parameters():
    module = PositionRelation(4)
    assert not module.weight.any()
    assert (module.bias == 1).all()
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {"weight": (4, 64), "bias": (4,)}


def test_far_and_tiny_boxes():
    """Angles of hundreds of radians in float32, beside float64; equal boxes; boxes without size."""
    module = random_relation(3, torch.float64)
    source, target = (random_boxes(2, 40).double() for _ in range(2))
    source[:, :10, 2:] = 1e-3
    target[:, 5:15, 2:] = 1e-3
    target[:, 20:] = source[:, 20:]
    expected = module.pair_bias(source.float().double(), target.float().double())
    assert_near([module.float().pair_bias(source.float(), target.float()).double()], [expected], 1e-4)
    empty = torch.zeros(1, 3, 4)
    assert module.pair_bias(empty, empty).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Queries and values in half precision, under autocast or not; the bias is as exact as in float32."""
    (q, k, v), options = random_inputs(dtype=torch.float32)
    module = random_relation(3)
    halves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().float().requires_grad_() for x in halves]
    expected = with_gradients(module, module, wide, options)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = with_gradients(module, module, halves, options)
        assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32] * 2
        assert_near([x.float() for x in found], expected, 0.02)


def test_rules_of_the_operator():
    """Shapes, dtypes and layouts of fake tensors; autograd; nothing written to."""
    inputs, options = random_inputs(1, 2, 5, dtype=torch.float32)
    module = random_relation(2)
    factors = [
        x.detach().requires_grad_(i in (2, 3))
        for i, x in enumerate(module.factors(options["source"], options["target"]))
    ]
    for mask in (options["mask"], None):
        torch.library.opcheck(torch.ops.dino.relation_attention, (*inputs, mask, *factors))


def test_compiled_for_any_size():
    """One graph without breaks, for any number of images and queries."""
    module, graphs = random_relation(3), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module.forward, fullgraph=True, dynamic=True, backend=keep)
    for images, queries in ((2, 5), (3, 9), (4, 6)):
        inputs, options = random_inputs(images, 3, queries, dtype=torch.float32)
        assert_near([compiled(*inputs, **options)], [module(*inputs, **options)], 1e-6)
    assert len(graphs) == 1


class Positional(torch.nn.Module):
    """Takes its arguments in order, as exports want them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, q, k, v, source, target):
        return self.module(q, k, v, mask=None, source=source, target=target)


def exported_inputs(images, queries):
    inputs, options = random_inputs(images, 3, queries, dtype=torch.float32)
    return *(x.detach() for x in inputs), options["source"], options["target"]


def test_traced_for_any_size():
    """TorchScript and torch.export have operators of PyTorch only."""
    module = Positional(random_relation(3)).requires_grad_(False)
    inputs = exported_inputs(2, 5)
    images, queries = torch.export.Dim("images"), torch.export.Dim("queries")
    sizes = [{0: images, 2: queries}] * 3 + [{0: images, 1: queries}] * 2
    traced = torch.jit.trace(module, inputs)
    exported = torch.export.export(module, inputs, dynamic_shapes=tuple(sizes))
    assert "relation_attention" not in str(traced.inlined_graph) + str(exported.graph)
    for others in (inputs, exported_inputs(3, 11)):
        for form in (traced, exported.module()):
            assert_near([form(*others)], [module(*others)], 1e-4)


def test_nothing_of_all_pairs_is_kept():
    """What autograd keeps grows with the queries, not with their square."""
    module, kept = random_relation(8), []
    inputs, options = random_inputs(1, 8, 300, dtype=torch.float32, masked=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = module(*inputs, **options)
    assert output.requires_grad
    assert max(x.untyped_storage().nbytes() for x in kept) < 4 * 8 * 300 * 40
    again = io.BytesIO()
    torch.save(module, again)  # and the module can be written whole
    assert again.tell()
