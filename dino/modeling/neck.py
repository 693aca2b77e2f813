"""The feature pyramid: a backbone's maps projected to one width, and extra coarser levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backbones import extract, padding_of


class ChannelMapper(nn.Module):
    """Projects the maps of a backbone to one width and adds extra levels.

    Each extra level halves the size: the first comes from the backbone's last map, each further one from the level
    before it.

    Args:
        backbone: images (B, 3, H, W) -> dict of maps; `output_shape()` has `.channels` and `.stride` for each name. Its
            images are padded to the sizes that it needs (see `padding_of`).
        in_features: names of the maps to use, finest first.
        out_channels: E, a multiple of `norm_groups`.
        num_levels: L, at least as many as `in_features`.
        norm_groups: groups of the GroupNorm after each projection.

    Raises:
        ValueError: unknown feature names, names not sorted by stride, too few levels, or an odd width.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: Sequence[str],
        out_channels: int = 256,
        num_levels: int = 4,
        norm_groups: int = 32,
    ):
        super().__init__()
        shapes = backbone.output_shape()
        _check_features(list(in_features), {name: s.stride for name, s in shapes.items()}, num_levels)
        if out_channels % norm_groups:
            raise ValueError(f"out_channels {out_channels} is not a multiple of norm_groups {norm_groups}")
        self.backbone = backbone
        self.padding = padding_of(backbone)
        self.in_features = list(in_features)
        self.out_channels = out_channels
        self.num_levels = num_levels
        channels = [shapes[name].channels for name in in_features]
        extra = [channels[-1], *[out_channels] * num_levels][: num_levels - len(channels)]
        self.lateral = nn.ModuleList(_projection(c, out_channels, 1, 1, norm_groups) for c in channels)
        self.extra_levels = nn.ModuleList(_projection(c, out_channels, 3, 2, norm_groups) for c in extra)
        self.register_load_state_dict_pre_hook(_rename_former_keys)
        self.to(memory_format=torch.channels_last)  # faster on every device, and tokens need no transposition

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> L maps (B, E, h, w), finest first."""
        images = images.contiguous(memory_format=torch.channels_last)
        maps = extract(self.backbone, images, self.padding)
        levels = [project(maps[name]) for project, name in zip(self.lateral, self.in_features, strict=True)]
        last = maps[self.in_features[-1]]
        for project in self.extra_levels:
            last = project(last)
            levels.append(last)
        return levels


def _rename_former_keys(neck: ChannelMapper, state_dict: dict, prefix: str, *_) -> None:
    """Let the neck load what earlier versions saved: they called `extra_levels` `coarser`."""
    front = f"{prefix}coarser."
    for key in [key for key in state_dict if key.startswith(front)]:
        state_dict[f"{prefix}extra_levels.{key.removeprefix(front)}"] = state_dict.pop(key)


def _check_features(names: list[str], strides: dict[str, int], num_levels: int) -> None:
    """Raise a ValueError where `names` do not describe a pyramid of at most `num_levels` levels."""
    unknown = [name for name in names if name not in strides]
    if unknown or not names:
        raise ValueError(f"in_features {names}: the backbone has {sorted(strides)}")
    if sorted(names, key=strides.get) != names:
        raise ValueError(f"in_features {names} must go from the finest to the coarsest level")
    if num_levels < len(names):
        raise ValueError(f"num_levels {num_levels} is less than the number of in_features {names}")


def _projection(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm_groups: int) -> nn.Sequential:
    """Convolution and GroupNorm, without activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(norm_groups, out_channels))
