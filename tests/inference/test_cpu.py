"""What makes prediction on a CPU faster gives the results of the plain network."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from dino.inference import cpu
from dino.inference.cpu import _use_onednn, fold_norms, prepare_for_cpu
from dino.layers.cpu_feed_forward import CpuFeedForward
from dino.layers.feed_forward import FeedForward
from dino.modeling import TorchvisionBackbone

from ..tiny import tiny_network

TYPES = [dtype for dtype in cpu._SUPPORT if cpu._is_supported(dtype)]

needs_onednn = pytest.mark.skipif(torch.float32 not in TYPES, reason="this PyTorch has no oneDNN")


def randomise(model):
    """Statistics as after training, not 0 and 1."""
    torch.manual_seed(0)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight")):
            x.data.uniform_(0.5, 1.5)
        elif x.is_floating_point() and x.dim() == 1:
            x.data.normal_(std=0.2)


def compare_folded(model, count, of=lambda y: y):
    randomise(model.eval())
    images = torch.randn(1, 3, 64, 72)
    with torch.no_grad():
        before = of(model(images))
        assert fold_norms(model) == count
        after = of(model(images))
    assert fold_norms(model) == 0
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize(("name", "norm", "count"), [("resnet18", "BN", 20), ("resnet50", "FrozenBN", 53)])
def test_torchvision(name, norm, count):
    compare_folded(TorchvisionBackbone(name, norm=norm), count, lambda maps: maps.values())


def test_efficientnet():
    model = TorchvisionBackbone("efficientnet_b0", norm="BN")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    compare_folded(model, norms, lambda maps: maps.values())


def test_detectron2():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import ResNet
    from detectron2.modeling.backbone import BasicStem

    stages = ResNet.make_default_stages(depth=50, stride_in_1x1=False, norm="FrozenBN")
    stem = BasicStem(in_channels=3, out_channels=64, norm="FrozenBN")
    compare_folded(ResNet(stem=stem, stages=stages, out_features=["res3", "res5"]), 53, lambda maps: maps.values())


class NormAndActivation(nn.BatchNorm2d):
    """More than a norm, as timm's."""

    def forward(self, maps):
        return super().forward(maps).relu()


def test_a_norm_of_another_kind_stays():
    compare_folded(nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4)), 0)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        fold_norms(TorchvisionBackbone("resnet18").train())


def compare_fused(model, images, count, dtype=torch.float32, of=lambda y: y):
    model, images = nn.Sequential(model).eval().to(dtype), images.to(dtype)
    with torch.no_grad():
        before = of(model(images))
        assert _use_onednn(model) == count
        after = of(model(images))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=tolerance * x.abs().max().item())


def folded(name):
    model = TorchvisionBackbone(name)
    randomise(model.eval())
    fold_norms(model)
    return model


@needs_onednn
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16), ("resnext50_32x4d", 16)])
def test_residual_blocks(name, blocks, dtype):
    compare_fused(folded(name), torch.randn(2, 3, 70, 64), blocks, dtype, lambda maps: maps.values())


@needs_onednn
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [(32, 32), (1, 40)])
def test_residual_blocks_with_one_cell(size, dtype):
    compare_fused(folded("resnet18"), torch.randn(1, 3, *size), 8, dtype, lambda maps: maps.values())


@needs_onednn
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 900, cpu._PART, cpu._PART + 1])
def test_feed_forward(tokens, dtype):
    compare_fused(FeedForward(16, 32), torch.randn(2, tokens, 16), 3, dtype)  # it, and its two linear layers


@needs_onednn
def test_linear_layer_without_bias():
    compare_fused(nn.Linear(5, 7, bias=False), torch.randn(2, 3, 5), 1)


@needs_onednn
def test_blocks_with_norms_stay():
    model = TorchvisionBackbone("resnet18", norm="BN")
    assert _use_onednn(model.eval()) == 0


@needs_onednn
def test_gradients_come_as_before():
    torch.manual_seed(0)
    model, images = nn.Sequential(FeedForward(8, 16), nn.Linear(8, 3)), torch.randn(2, 5, 8)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    _use_onednn(model)
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    for x, y in zip(expected, found, strict=True):
        assert torch.equal(x, y)


@needs_onednn
def test_names_of_parameters_stay():
    model = nn.Sequential(FeedForward(8, 16), nn.Linear(8, 3))
    names = list(model.state_dict())
    _use_onednn(model)
    assert list(model.state_dict()) == names


@needs_onednn
@torch.no_grad()
def test_a_compiler_sees_the_plain_operations():
    model, images = nn.Sequential(FeedForward(8, 16)), torch.randn(2, 5, 8)
    seen = []

    def note(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    expected = model(images)
    _use_onednn(model)
    torch.testing.assert_close(torch.compile(model, backend=note)(images), expected)
    assert seen
    assert not any("mkldnn" in name for name in seen)


@needs_onednn
def test_other_devices_and_types_stay():
    assert _use_onednn(nn.Sequential(nn.Linear(2, 2, device="meta"))) == 0
    assert _use_onednn(nn.Sequential(nn.Linear(2, 2).double())) == 0


@needs_onednn
@pytest.mark.parametrize("fault", [RuntimeError("unsupported"), None])
def test_operators_that_fail_in_the_trial_are_not_used(monkeypatch, fault):
    def wrong(module, x, activation="none"):
        if fault:
            raise fault
        return torch.ones(*x.shape[:-1], module.out_features)

    cpu._is_supported.cache_clear()
    monkeypatch.setattr(cpu, "_linear", wrong)
    layer, state = nn.Sequential(nn.Linear(2, 2)), torch.get_rng_state()
    assert _use_onednn(layer) == 0
    assert torch.equal(torch.get_rng_state(), state)
    cpu._is_supported.cache_clear()


@needs_onednn
@torch.no_grad()
def test_not_a_number_is_not_lost():
    model = nn.Sequential(FeedForward(4, 8))
    _use_onednn(model)
    images = torch.zeros(1, 3, 4)
    images[0, 1, 2] = torch.nan
    assert model(images).isnan().any(-1).tolist() == [[False, True, False]]


@needs_onednn
def test_blocks_train_as_before():
    """Outside `no_grad` a prepared block computes as torchvision's."""
    plain = folded("resnet18")
    prepared = copy.deepcopy(plain)
    assert _use_onednn(prepared) == 8
    images = torch.randn(1, 3, 64, 64)
    for x, y in zip(plain(images).values(), prepared(images).values(), strict=True):
        assert torch.equal(x, y)
        assert y.requires_grad


def test_a_prepared_network_predicts_the_same():
    torch.manual_seed(0)
    network, images, padding = tiny_network().eval(), torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96).bool()
    prepared = copy.deepcopy(network)
    prepare_for_cpu(prepared)
    assert list(prepared.state_dict()) == list(network.state_dict())
    with torch.no_grad():
        expected, found = network(images, padding).decoder, prepared(images, padding).decoder
    torch.testing.assert_close(found.boxes, expected.boxes)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)


def test_preparing_twice_changes_nothing_more():
    model = nn.Sequential(folded("resnet18"), FeedForward(8, 16))
    prepare_for_cpu(model.eval())
    before = list(model.modules())
    prepare_for_cpu(model)
    assert all(x is y for x, y in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_feed_forward_in_parts_where_onednn_can_not(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_is_supported", lambda dtype: False)
    model = nn.Sequential(FeedForward(8, 16)).to(dtype).eval()
    prepare_for_cpu(model)
    assert type(model[0]) is CpuFeedForward


def test_models_on_other_devices_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), FeedForward(4, 8)).to("meta").eval()
    kinds = [type(module) for module in model]
    prepare_for_cpu(model)
    assert [type(module) for module in model] == kinds


@torch.no_grad()
def test_a_prepared_model_runs_on_another_device_too():
    model = nn.Sequential(FeedForward(4, 8), nn.Linear(4, 2)).eval()
    prepare_for_cpu(model)
    assert model.to("meta")(torch.zeros(1, 5, 4, device="meta")).shape == (1, 5, 2)


def test_training_mode_is_not_prepared():
    with pytest.raises(ValueError, match="training mode"):
        prepare_for_cpu(TorchvisionBackbone("resnet18").train())


PROGRAM = """
import ctypes, resource
from dino.inference.cpu import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def fill():
    block = ctypes.c_void_p(libc.malloc(64_000_000))
    ctypes.memset(block, 1, 64_000_000)
    libc.free(block)
def faults():
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        fill()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
keep_freed_memory()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc: nothing is done")
def test_large_blocks_are_used_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept * 20 < plain
