import pytest
import torch
from torch import nn

from dino.inference import onednn
from dino.modeling import TorchvisionBackbone, fold_norms, use_onednn
from dino.modeling.transformer import FeedForward

from .test_folding import randomise

TYPES = [dtype for dtype in onednn.SUPPORT if onednn.works(dtype)]

pytestmark = pytest.mark.skipif(torch.float32 not in TYPES, reason="this PyTorch has no oneDNN")


def compare(model, images, count, dtype=torch.float32, of=lambda y: y):
    model, images = model.eval().to(dtype), images.to(dtype)
    with torch.no_grad():
        before = of(model(images))
        assert use_onednn(model) == count
        after = of(model(images))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=tolerance * x.abs().max().item())


def folded(name):
    model = TorchvisionBackbone(name)
    randomise(model.eval())
    fold_norms(model)
    return model


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16), ("resnext50_32x4d", 16)])
def test_residual_blocks(name, blocks, dtype):
    compare(folded(name), torch.randn(2, 3, 70, 64), blocks, dtype, lambda maps: maps.values())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [(32, 32), (1, 40)])
def test_residual_blocks_with_one_cell(size, dtype):
    compare(folded("resnet18"), torch.randn(1, 3, *size), 8, dtype, lambda maps: maps.values())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 900, onednn.PART, onednn.PART + 1])
def test_feed_forward(tokens, dtype):
    compare(FeedForward(16, 32), torch.randn(2, tokens, 16), 3, dtype)  # it, and its two linear layers


def test_linear_layer_without_bias():
    compare(nn.Linear(5, 7, bias=False), torch.randn(2, 3, 5), 1)


def test_blocks_with_norms_stay():
    model = TorchvisionBackbone("resnet18", norm="BN")
    assert use_onednn(model.eval()) == 0


def test_gradients_come_as_before():
    torch.manual_seed(0)
    model, images = nn.Sequential(FeedForward(8, 16), nn.Linear(8, 3)), torch.randn(2, 5, 8)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    use_onednn(model)
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    for x, y in zip(expected, found, strict=True):
        assert torch.equal(x, y)


def test_names_of_parameters_stay():
    model = nn.Sequential(FeedForward(8, 16), nn.Linear(8, 3))
    names = list(model.state_dict())
    use_onednn(model)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_a_compiler_sees_the_plain_operations():
    model, images = FeedForward(8, 16), torch.randn(2, 5, 8)
    seen = []

    def note(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    expected = model(images)
    use_onednn(model)
    torch.testing.assert_close(torch.compile(model, backend=note)(images), expected)
    assert seen
    assert not any("mkldnn" in name for name in seen)


def test_other_devices_and_types_stay():
    assert use_onednn(nn.Linear(2, 2, device="meta")) == 0
    assert use_onednn(nn.Linear(2, 2).double()) == 0


@pytest.mark.parametrize("fault", [RuntimeError("unsupported"), None])
def test_operators_that_fail_in_the_trial_are_not_used(monkeypatch, fault):
    def wrong(module, x, behind="none"):
        if fault:
            raise fault
        return torch.ones(*x.shape[:-1], module.out_features)

    onednn.works.cache_clear()
    monkeypatch.setattr(onednn, "linear", wrong)
    layer, state = nn.Linear(2, 2), torch.get_rng_state()
    assert use_onednn(layer) == 0
    assert torch.equal(torch.get_rng_state(), state)
    onednn.works.cache_clear()


@torch.no_grad()
def test_not_a_number_is_not_lost():
    model = FeedForward(4, 8)
    use_onednn(model)
    images = torch.zeros(1, 3, 4)
    images[0, 1, 2] = torch.nan
    assert model(images).isnan().any(-1).tolist() == [[False, True, False]]
