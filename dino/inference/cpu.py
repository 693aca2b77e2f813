"""Faster prediction on a CPU: folded norms, fused operations of oneDNN, and reuse of freed memory."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.layers.cpu_feed_forward import CpuFeedForward, as_kind, replace_modules, use_cpu_feed_forward
from dino.layers.feed_forward import FeedForward

_RESNET = "torchvision.models.resnet"  # BasicBlock, Bottleneck
_STATISTICS = ("weight", "bias", "running_mean", "running_var", "eps")
_PART = 4096  # tokens that a feed-forward network takes at a time, so that its hidden state needs little memory
_SUPPORT = {  # whether the processor has instructions for a type
    torch.float32: lambda: True,
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
_SIMPLE = (nn.Conv2d, nn.Identity, nn.ReLU, nn.Sequential)  # parts of a residual block whose norms are folded
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare_for_cpu(model: nn.Module) -> None:
    """Make prediction faster, in place, if all of `model` is on a CPU; do nothing on other devices.

    Folds batch norms, then replaces modules, see `fold_norms`, `use_cpu_feed_forward` and `_use_onednn`. Gradients and
    `torch.compile` work as before. Folding in a half type loses accuracy: call `fold_norms` before the cast.

    Args:
        model: in evaluation mode, in its final dtype, with its weights loaded. It is itself not replaced.

    Raises:
        ValueError: the model is in training mode.
    """
    if _on_cpu(model):
        fold_norms(model)
        use_cpu_feed_forward(model)
        _use_onednn(model)


def fold_norms(model: nn.Module) -> int:
    """Multiply the scale of each batch norm into the convolution before it, and remove the norm; in place.

    Knows Detectron2's convolutions, which have a `norm`, and torchvision's blocks, where a norm follows its
    convolution. Other norms stay. This changes the keys of the state dict: load weights before.

    Args:
        model: in evaluation mode, on any device.

    Returns:
        the number of folded norms.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("batch norms can't be folded in training mode: call model.eval() first")
    found = list(_foldable(model))
    for owner, name, conv, norm in found:
        _merge(conv, norm)
        setattr(owner, name, None if owner is conv else nn.Identity())
    return len(found)


def _foldable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d, nn.Module]]:
    """(module that has the norm, its name there, convolution, norm) for each pair."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_frozen(getattr(module, "norm", None)):
            yield module, "norm", module, module.norm
        if isinstance(module, nn.Sequential) or type(module).__module__ == _RESNET:  # children run in their order
            for (_, conv), (name, norm) in pairwise(list(module.named_children())):
                if type(conv) is nn.Conv2d and _is_frozen(norm):
                    yield module, name, conv, norm


def _is_frozen(norm: nn.Module | None) -> bool:
    """A plain batch norm with fixed statistics: PyTorch's in evaluation mode, or a frozen one."""
    if type(norm) is nn.BatchNorm2d:
        return norm.affine and norm.track_running_stats
    return type(norm).__name__ == "FrozenBatchNorm2d"


@torch.no_grad()
def _merge(conv: nn.Conv2d, norm: nn.Module) -> None:
    """conv <- norm o conv."""
    weight, bias, mean, variance, eps = (getattr(norm, name) for name in _STATISTICS)
    scale: Tensor = weight * (variance + eps).rsqrt()  # (C,)
    before = 0 if conv.bias is None else conv.bias
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(bias + (before - mean) * scale, requires_grad=False)


def _use_onednn(model: nn.Module) -> int:
    """Replace linear layers, feed-forward networks and torchvision's residual blocks by fused ones of oneDNN; in place.

    A fused module runs a layer with the ReLU or sum after it in one operator, which has no gradient. Results differ by
    rounding. With gradients, and under `torch.compile`, it runs the plain operations. Parameters stay the same objects
    under the same names. Does nothing if a parameter is not on a CPU, or if oneDNN does not support its dtype there.

    Args:
        model: in its final dtype, after `fold_norms`: blocks with norms stay. It is itself not replaced.

    Returns:
        the number of modules that were replaced.
    """
    if not (_on_cpu(model) and all(_is_supported(dtype) for dtype in {p.dtype for p in model.parameters()})):
        return 0
    return replace_modules(model, _fused_kind)


def _on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


@functools.cache
def _is_supported(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are in this PyTorch, fast for tensors of this type here, and right in a trial."""
    try:
        return torch.backends.mkldnn.is_available() and _SUPPORT[dtype]() and _trial(dtype)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError):
        return False


@torch.no_grad()
def _trial(dtype: torch.dtype) -> bool:
    """Whether the fused operations give the results of the plain ones for a few numbers."""
    with torch.random.fork_rng(devices=[]):
        network = as_kind(FeedForward(4, 8).to(dtype), _OneDnnFeedForward)
        block = _OneDnnResidualBlock()
        block.conv1, block.conv2, block.downsample = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), None
    tokens, maps = (torch.linspace(-1, 1, 64, dtype=dtype).view(shape) for shape in ((2, 8, 4), (1, 8, 2, 4)))
    pairs = [(network.fused(tokens), network.plain(tokens)), (block.to(dtype).fused(maps), block.plain(maps))]
    return all(torch.allclose(x, y, rtol=0.05, atol=0.05) for x, y in pairs)


def _fused_kind(module: nn.Module) -> type[nn.Module] | None:
    """The fused class for a module; None if there is none."""
    if type(module) is nn.Linear:
        return _OneDnnLinear
    if type(module) in (FeedForward, CpuFeedForward):
        return _OneDnnFeedForward
    if type(module).__module__ == _RESNET and type(module).__name__ in ("BasicBlock", "Bottleneck"):
        return _OneDnnResidualBlock if all(type(part) in _SIMPLE for part in list(module.modules())[1:]) else None
    return None


class _Fused(nn.Module):
    """Takes the fused operations where they are possible, else the plain ones: each subclass has both."""

    def forward(self, x: Tensor) -> Tensor:
        """Gradients and traces need the plain operations; a compiler gets them too, and fuses them itself."""
        seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return self.plain(x) if seen or torch.is_grad_enabled() or not x.is_cpu else self.fused(x)


class _OneDnnLinear(_Fused, nn.Linear):
    """`nn.Linear` as one operator of oneDNN."""

    plain = nn.Linear.forward

    def fused(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return _linear(self, x)


class _OneDnnFeedForward(_Fused, CpuFeedForward):
    """`FeedForward` in parts of `_PART` tokens, with the ReLU in the operator of the first linear layer."""

    plain = CpuFeedForward.forward

    def fused(self, x: Tensor) -> Tensor:
        """(B, N, E) -> the same shape."""
        results = []
        for part in x.split(_PART, 1):
            hidden = _linear(self.linear1, part, "relu")  # (B, n, F)
            results.append(self.norm(part + _linear(self.linear2, hidden)))
        return torch.cat(results, 1)


class _OneDnnResidualBlock(_Fused):
    """torchvision's `BasicBlock` or `Bottleneck` after `fold_norms`, with ReLU and sum inside the convolutions."""

    def plain(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        *others, last = self._convolutions()
        y = x
        for conv in others:
            y = F.relu(conv(y), inplace=True)
        return F.relu(last(y) + (x if self.downsample is None else self.downsample(x)), inplace=True)

    def fused(self, x: Tensor) -> Tensor:
        """As `plain`; the result is channels last: for half types oneDNN has no other sum."""
        *others, last = self._convolutions()
        x = y = x.contiguous(memory_format=torch.channels_last)
        for conv in others:
            y = torch.ops.mkldnn._convolution_pointwise(y, *_settings(conv), "relu", [], None)
        if self.downsample is not None:
            x = self.downsample(x)
        return torch.ops.mkldnn._convolution_pointwise.binary(y, x, *_settings(last), "add", 1.0, "relu", [], None)

    def _convolutions(self) -> list[nn.Conv2d]:
        return [conv for name, conv in self.named_children() if name.startswith("conv")]


def _linear(module: nn.Linear, x: Tensor, activation: str = "none") -> Tensor:
    """(..., I) -> (..., O); `activation` is "relu" or "none"."""
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, activation, [], None)


def _settings(conv: nn.Conv2d) -> tuple:
    """What oneDNN's operators need to know of a convolution, in their order."""
    return conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of giving it back to the system; for programs, not for libraries.

    Every run of a network needs the same large blocks. By default glibc returns them after use, and the system fills
    them with zeros, page by page, when they are asked for again. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
