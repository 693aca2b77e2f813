"""Parameter groups and learning rates that recipes name."""

from __future__ import annotations

from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from dino.modeling.blocks import depths, find_blocks

_BACKBONE = "network.neck.backbone."  # where `DINODetector` has it


def tenth_for_backbone(name: str) -> float:
    """Learning rate factor of the parameter `name`: a tenth for the backbone itself, as published."""
    return 0.1 if ".backbone." in name else 1.0


def tenth_for_backbone_and_offsets(name: str) -> float:
    """As `tenth_for_backbone`; a tenth for the sampling offsets of deformable attention too."""
    return 0.1 if ".backbone." in name or ".sampling_offsets." in name else 1.0


def layerwise_params(model: nn.Module, base_lr: float, rate: float, **options) -> list[dict]:
    """Parameter groups with layer-wise learning rate decay, for pre-trained transformers (arXiv 2106.08254).

    The last block of the backbone learns at `rate` times the rate of the detector. Each earlier block, and finally the
    stem, learns at `rate` times the rate of the next one. Layers after the blocks keep the full rate.

    Args:
        model: a `DINODetector`.
        base_lr: learning rate outside the backbone.
        rate: factor from block to block, for example 0.7 for ViT-B and 0.8 for ViT-L.
        options: of Detectron2's `get_default_optimizer_params`, for example `weight_decay_norm=0.0`.

    Raises:
        ValueError: no known blocks in the backbone.
    """
    backbone = model.network.neck.backbone
    after = len(find_blocks(backbone)) + 1
    factors = {f"{_BACKBONE}{name}": rate ** (after - depth) for name, depth in depths(backbone).items()}
    return get_default_optimizer_params(
        model, base_lr=base_lr, lr_factor_func=lambda name: factors.get(name, 1.0), **options
    )
