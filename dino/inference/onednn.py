"""Linear layers and convolutions together with the ReLU or sum behind them, in one pass of oneDNN: prediction on a CPU.

PyTorch brings the operators for its compiler. They have no gradients; their results differ by rounding.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.modeling.transformer import FeedForward

from .folding import RESNET

PART = 4096  # tokens that a feed-forward network takes at a time, so that its hidden state needs little memory
SUPPORT = {  # whether the processor has instructions for a type
    torch.float32: lambda: True,
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
SIMPLE = (nn.Conv2d, nn.Identity, nn.ReLU, nn.Sequential)  # parts of a residual block whose norms are folded


def use_onednn(model: nn.Module) -> int:
    """Let linear layers, feed-forward networks and residual blocks of torchvision run in oneDNN's operators; in place.

    They do so where no gradients are asked for. Parameters, their names and what `torch.compile` sees stay the same.
    Nothing happens where the model is not on a CPU, or oneDNN can't do its type there.

    Args:
        model: in its final type and place, after `fold_norms`: blocks with norms stay as they are.

    Returns:
        how many modules were changed.
    """
    if not all(parameter.device.type == "cpu" and works(parameter.dtype) for parameter in model.parameters()):
        return 0
    found = {module: fused for module in model.modules() if (fused := fused_forward(module))}
    for module, fused in found.items():
        module.forward = functools.partial(choose, module, fused)
    return len(found)


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are in this PyTorch, fast for tensors of this type here, and right in a trial."""
    try:
        return torch.backends.mkldnn.is_available() and SUPPORT[dtype]() and trial(dtype)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError):
        return False


@torch.no_grad()
def trial(dtype: torch.dtype) -> bool:
    """Whether a feed-forward network and a residual block of a few numbers come out as without oneDNN's operators."""
    with torch.random.fork_rng(devices=[]):
        network = FeedForward(4, 8).to(dtype)
        block = nn.Sequential(
            OrderedDict(conv1=nn.Conv2d(8, 8, 1), relu=nn.ReLU(), conv2=nn.Conv2d(8, 8, 3, padding=1))
        )
    block.downsample = None
    tokens, maps = (torch.linspace(-1, 1, 64, dtype=dtype).view(shape) for shape in ((2, 8, 4), (1, 8, 2, 4)))
    pairs = [
        (feed_forward(network, tokens), network(tokens)),
        (residual_block(block.to(dtype), maps), F.relu(block(maps) + maps)),
    ]
    return all(torch.allclose(x, y, rtol=0.05, atol=0.05) for x, y in pairs)


def fused_forward(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What computes the same as the forward of `module`, called with it and its input; None for modules not known."""
    if type(module) in FUSED:
        return FUSED[type(module)]
    if type(module).__module__ == RESNET and type(module).__name__ in ("BasicBlock", "Bottleneck"):
        return residual_block if all(type(part) in SIMPLE for part in list(module.modules())[1:]) else None
    return None


def choose(module: nn.Module, fused: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradients need the plain operations; a compiler gets them, too, and fuses them itself."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return type(module).forward(module, x) if plain else fused(module, x)


def feed_forward(module: FeedForward, x: Tensor) -> Tensor:
    """(B, ·, E) -> the same shape."""
    results = []
    for part in x.split(PART, 1):
        hidden = linear(module.linear1, part, "relu")  # (B, n, F)
        results.append(module.norm(part + linear(module.linear2, hidden)))
    return torch.cat(results, 1)


def residual_block(block: nn.Module, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C', H', W'), channels last: half types know no other sum."""
    *others, last = [conv for name, conv in block.named_children() if name.startswith("conv")]
    x = y = x.contiguous(memory_format=torch.channels_last)
    for conv in others:
        y = torch.ops.mkldnn._convolution_pointwise(y, *settings(conv), "relu", [], None)
    if block.downsample is not None:
        x = block.downsample(x)
    return torch.ops.mkldnn._convolution_pointwise.binary(y, x, *settings(last), "add", 1.0, "relu", [], None)


def linear(module: nn.Linear, x: Tensor, behind: str = "none") -> Tensor:
    """(..., I) -> (..., O); `behind` is "relu" or "none"."""
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, behind, [], None)


def settings(conv: nn.Conv2d) -> tuple:
    """The arguments by which oneDNN's operators know a convolution."""
    return conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups


FUSED = {nn.Linear: linear, FeedForward: feed_forward}
