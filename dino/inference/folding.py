"""Frozen batch norms merged into the convolutions before them, for models that are not trained any more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

RESNET = "torchvision.models.resnet"  # BasicBlock, Bottleneck
STATISTICS = ("weight", "bias", "running_mean", "running_var", "eps")


def fold_norms(model: nn.Module) -> int:
    """Multiply the scale of each batch norm into the convolution in front of it, and drop the norm; in place.

    Knows Detectron2's convolutions, which have a `norm`, and the blocks of torchvision, where a norm stands behind its
    convolution. Other norms stay. The state dict is another one afterwards: load weights before.

    Args:
        model: in evaluation mode.

    Returns:
        how many norms were merged.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("batch norms can't be folded in training mode: call model.eval() first")
    found = list(foldable(model))
    for owner, name, conv, norm in found:
        merge(conv, norm)
        setattr(owner, name, None if owner is conv else nn.Identity())
    return len(found)


def foldable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d, nn.Module]]:
    """(module that has the norm, its name there, convolution, norm) for each pair."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and is_frozen(getattr(module, "norm", None)):
            yield module, "norm", module, module.norm
        if isinstance(module, nn.Sequential) or type(module).__module__ == RESNET:  # children run in their order
            for (_, conv), (name, norm) in pairwise(list(module.named_children())):
                if type(conv) is nn.Conv2d and is_frozen(norm):
                    yield module, name, conv, norm


def is_frozen(norm: nn.Module | None) -> bool:
    """A plain batch norm with fixed statistics: PyTorch's in evaluation mode, or a frozen one."""
    if type(norm) is nn.BatchNorm2d:
        return norm.affine and norm.track_running_stats
    return type(norm).__name__ == "FrozenBatchNorm2d"


@torch.no_grad()
def merge(conv: nn.Conv2d, norm: nn.Module) -> None:
    """conv <- norm o conv."""
    weight, bias, mean, variance, eps = (getattr(norm, name) for name in STATISTICS)
    scale: Tensor = weight * (variance + eps).rsqrt()  # (C,)
    before = 0 if conv.bias is None else conv.bias
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(bias + (before - mean) * scale, requires_grad=False)
