"""Frozen batch norms merged into the convolutions before them, for models that are not trained any more."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

STATISTICS = ("weight", "bias", "running_mean", "running_var", "eps")


def fold_norms(model: nn.Module) -> int:
    """Multiply the scale of each batch norm into the convolution in front of it, and drop the norm; in place.

    Knows the layers of Detectron2 (`Conv2d` with a `norm`) and networks traced by torch.fx, as torchvision's extractors
    are. Other norms stay. The state dict is another one afterwards: load weights before.

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
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                conv = submodule(module, node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
                norm = submodule(module, node)
                if isinstance(conv, nn.Conv2d) and is_frozen(norm) and len(node.args[0].users) == 1:
                    owner, _, name = node.target.rpartition(".")
                    yield module.get_submodule(owner), name, conv, norm


def submodule(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """What a node calls, if that is a module."""
    return graph.get_submodule(node.target) if node.op == "call_module" else None


def is_frozen(norm: nn.Module | None) -> bool:
    """A batch norm with fixed statistics: PyTorch's in evaluation mode, torchvision's or Detectron2's frozen one."""
    if isinstance(norm, nn.BatchNorm2d):
        return norm.affine and norm.track_running_stats
    return isinstance(norm, FrozenBatchNorm2d) or type(norm).__name__ == "FrozenBatchNorm2d"


@torch.no_grad()
def merge(conv: nn.Conv2d, norm: nn.Module) -> None:
    """conv <- norm o conv."""
    weight, bias, mean, variance, eps = (getattr(norm, name) for name in STATISTICS)
    scale: Tensor = weight * (variance + eps).rsqrt()  # (C,)
    before = 0 if conv.bias is None else conv.bias
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(bias + (before - mean) * scale, requires_grad=False)
