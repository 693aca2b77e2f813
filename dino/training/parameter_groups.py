"""Parameter groups and learning rates that recipes name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from dino.modeling.blocks import depths, find_blocks

_BACKBONE = "network.neck.backbone."  # where a `Detector` has it
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def tenth_for_backbone(name: str) -> float:
    """Learning rate factor of the parameter `name`: a tenth for the backbone itself, as published."""
    return 0.1 if ".backbone." in name else 1.0


def tenth_for_backbone_and_offsets(name: str) -> float:
    """As `tenth_for_backbone`; a tenth for the sampling offsets of deformable attention too."""
    return 0.1 if ".backbone." in name or ".sampling_offsets." in name else 1.0


def parameter_groups(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters in groups of one setting each: Detectron2's `get_default_optimizer_params`.

    Args:
        model: a `Detector`.
        base_lr, weight_decay: of every group; those of the optimizer by default.
        weight_decay_norm: of parameters of norms.
        bias_lr_factor, weight_decay_bias: factor of the learning rate, and weight decay, of biases.
        lr_factor_func: name of a parameter -> factor of its learning rate; needs `base_lr`.
        overrides: last part of a parameter's name -> its settings.

    Raises:
        ValueError: a factor without `base_lr`, or two settings of biases.
    """
    named = _named_settings(base_lr, bias_lr_factor, weight_decay_bias, overrides or {})
    if base_lr is None and lr_factor_func is not None:
        raise ValueError("lr_factor_func needs base_lr")
    groups: dict[tuple, list[nn.Parameter]] = {}
    for module, name, parameter in _trained(model):
        lr = base_lr if lr_factor_func is None else base_lr * lr_factor_func(name)
        of_norms = _stated(weight_decay=weight_decay_norm) if isinstance(module, _NORMS) else {}
        settings = _stated(lr=lr, weight_decay=weight_decay) | of_norms | dict(named.get(name.rpartition(".")[2], {}))
        groups.setdefault(tuple(sorted(settings.items())), []).append(parameter)
    return [{"params": parameters, **dict(settings)} for settings, parameters in groups.items()]


def _named_settings(
    base_lr: float | None, factor: float | None, decay: float | None, overrides: Mapping[str, Mapping[str, float]]
) -> dict[str, Mapping[str, float]]:
    """Last part of a parameter's name -> its settings: the overrides, and those of biases."""
    factor = None if factor == 1.0 else factor
    if base_lr is None and factor is not None:
        raise ValueError("bias_lr_factor needs base_lr")
    biases = _stated(lr=factor and base_lr * factor, weight_decay=decay)
    if biases and "bias" in overrides:
        raise ValueError("biases have settings among the overrides, so they can't have bias_lr_factor or a decay too")
    return {**overrides, "bias": biases} if biases else dict(overrides)


def _stated(**settings: float | None) -> dict[str, float]:
    """The settings that are not None."""
    return {key: value for key, value in settings.items() if value is not None}


def _trained(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The module, the full name and the value of each parameter that is trained, once."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, f"{prefix}.{name}", parameter


def layerwise_params(model: nn.Module, base_lr: float, rate: float, **options) -> list[dict]:
    """Parameter groups with layer-wise learning rate decay, for pre-trained transformers (arXiv 2106.08254).

    The last block of the backbone learns at `rate` times the rate of the detector. Each earlier block, and finally the
    stem, learns at `rate` times the rate of the next one. Layers after the blocks keep the full rate.

    Args:
        model: a `Detector`.
        base_lr: learning rate outside the backbone.
        rate: factor from block to block, for example 0.7 for ViT-B and 0.8 for ViT-L.
        options: of Detectron2's `get_default_optimizer_params`, for example `weight_decay_norm=0.0`.

    Raises:
        ValueError: no known blocks in the backbone.
    """
    backbone = model.network.neck.backbone
    after = len(find_blocks(backbone)) + 1
    factors = {f"{_BACKBONE}{name}": rate ** (after - depth) for name, depth in depths(backbone).items()}
    return parameter_groups(model, base_lr=base_lr, lr_factor_func=lambda name: factors.get(name, 1.0), **options)
