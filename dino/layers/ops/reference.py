"""Deformable attention in plain PyTorch: the definition of the operator (Deformable DETR, arXiv 2010.04159, eq. 3)."""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.structures import extents

Shapes = list[tuple[int, int]]


def deform_attn_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deform_attn` in plain PyTorch, on any device: the definition against which faster forms are tested.

    Computes half types in float32. Arguments and result as in `deform_attn`.
    """
    return _sum_of_samples(value, shapes, locations, weights, _grid_sample)


def deform_attn_gather(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deform_attn_reference` without `grid_sample`, which some programs that run exported graphs compute wrongly."""
    return _sum_of_samples(value, shapes, locations, weights, _gather_samples)


def _grid_sample(image: Tensor, grid: Tensor) -> Tensor:
    """image (N, D, H, W), grid (N, Q, P, 2) as (x, y) in [-1, 1] from edge to edge -> (N, D, Q, P)."""
    return F.grid_sample(image, grid, align_corners=False)


def _gather_samples(image: Tensor, grid: Tensor) -> Tensor:
    """`_grid_sample` by index look-ups and arithmetic alone."""
    batch, dim, height, width = image.shape
    size = extents([(height, width)], grid)  # (1, 2)
    location = ((grid + 1) * size - 1) / 2  # in cells
    cells = image.permute(0, 2, 3, 1).reshape(-1, dim)  # (N*H*W, D)
    first = torch.arange(batch, device=grid.device)[:, None, None] * (height * width)  # cell of each image
    result = image.new_zeros((*grid.shape[:3], dim))  # (N, Q, P, D)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        corner = location.floor() + torch.stack([location.new_full((), right), location.new_full((), below)])
        share = (1 - (location - corner).abs()).prod(-1)  # (N, Q, P)
        share = share * ((corner >= 0) & (corner < size)).all(-1)
        x, y = corner.clamp(min=0).minimum(size - 1).long().unbind(-1)
        found = cells.index_select(0, (first + y * width + x).flatten()).view(result.shape)
        result = result + found * share[..., None]
    return result.permute(0, 3, 1, 2)


def _sum_of_samples(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, sample: Callable) -> Tensor:
    """`deform_attn` from a function that samples one level of the pyramid, see `_grid_sample`."""
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    # Autocast refuses tensors without data.
    with contextlib.nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False):
        grids = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
        weights = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P)
        result = value.new_zeros((batch * heads, dim, queries), dtype=dtype)
        for level, part in enumerate(value.to(dtype).split([h * w for h, w in shapes], 1)):
            image = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, *shapes[level])  # (B*M, D, H, W)
            samples = sample(image, grids[:, :, level])  # (B*M, D, Q, P)
            result = result + (samples * weights[:, None, :, level]).sum(-1)
    return result.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


def check_sizes(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    """Raise a ValueError that names the argument whose size does not fit."""
    tokens = sum(h * w for h, w in shapes)
    if value.dim() != 4 or value.shape[1] != tokens:
        raise ValueError(f"value must be (B, {tokens}, M, D) for levels {list(shapes)}, but is {tuple(value.shape)}")
    expected = (value.shape[0], value.shape[2], len(shapes), 2)
    if locations.dim() != 6 or (locations.shape[0], *locations.shape[2:4], locations.shape[5]) != expected:
        batch, heads, levels, _ = expected
        raise ValueError(f"locations must be ({batch}, Q, {heads}, {levels}, P, 2), but are {tuple(locations.shape)}")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"weights must be {tuple(locations.shape[:-1])}, but are {tuple(weights.shape)}")


def flat(shapes: Shapes) -> list[int]:
    """h0, w0, h1, w1, … as the compiled operator takes them."""
    return [size for shape in shapes for size in shape]
