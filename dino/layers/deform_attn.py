"""Multi-scale deformable attention: operator and module (Deformable DETR, arXiv 2010.04159, eq. 3)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.layers.ops.operator import autocast_dtype, cast_for_autocast, use_compiled, use_gather
from dino.structures import extents

Shapes = list[tuple[int, int]]


def deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of a feature pyramid, by the compiled operator where it is built.

    The variable DINO_DEFORM_ATTN (auto, reference, gather or compiled), read at each call outside compiled code, and
    the context manager `deform_attn_implementation` choose. Autocast casts `value` and `weights`, never `locations`.

    Args:
        value: (B, S, M, D), float32, float64, float16 or bfloat16; levels concatenated, row after row inside a level.
        shapes: L pairs (H, W) with sum of H*W = S.
        locations: (B, Q, M, L, P, 2) as (x, y) fractions of the level; 0 is the left or top edge, 1 the right or bottom
            edge. Samples outside read zeros. Keep them in float32: bfloat16 can't place a sample within a pixel.
        weights: (B, Q, M, L, P), of any of these types.

    Returns:
        (B, Q, M*D) in the dtype of `value`, or of autocast.

    Raises:
        ValueError: sizes that do not fit together; DINO_DEFORM_ATTN holds another word.
        RuntimeError: "compiled" was chosen, and the operator is not built or fails its self-test.
    """
    check_sizes(value, shapes, locations, weights)
    if use_compiled(value.device):
        return torch.ops.dino.deform_attn_forward(value, flat(shapes), locations, weights)
    dtype = autocast_dtype(value.device.type)
    value, weights = cast_for_autocast(value, dtype), cast_for_autocast(weights, dtype)
    form = deform_attn_gather if use_gather() else deform_attn_reference
    return form(value, shapes, locations, weights)


def flat(shapes: Shapes) -> list[int]:
    """h0, w0, h1, w1, … as the compiled operator takes them."""
    return [size for shape in shapes for size in shape]


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


def deform_attn_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deform_attn` in plain PyTorch, on any device: the definition against which faster forms are tested.

    Half types are to_float32 to float32 inside. Arguments and result as in `deform_attn`.
    """
    return sum_of_samples(value, shapes, locations, weights, grid_sample)


def deform_attn_gather(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deform_attn_reference` without `grid_sample`, for programs that get it wrong when they run an exported graph."""
    return sum_of_samples(value, shapes, locations, weights, gather_samples)


def grid_sample(image: Tensor, grid: Tensor) -> Tensor:
    """image (N, D, H, W), grid (N, Q, P, 2) as (x, y) in [-1, 1] from edge to edge -> (N, D, Q, P)."""
    return F.grid_sample(image, grid, align_corners=False)


def gather_samples(image: Tensor, grid: Tensor) -> Tensor:
    """`grid_sample` from look-ups by index and arithmetic alone."""
    batch, dim, height, width = image.shape
    size = extents([(height, width)], grid)  # (1, 2)
    place = ((grid + 1) * size - 1) / 2  # in cells
    cells = image.permute(0, 2, 3, 1).reshape(-1, dim)  # (N*H*W, D)
    first = torch.arange(batch, device=grid.device)[:, None, None] * (height * width)  # cell of each image
    result = image.new_zeros((*grid.shape[:3], dim))  # (N, Q, P, D)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        corner = place.floor() + torch.stack([place.new_full((), right), place.new_full((), below)])
        share = (1 - (place - corner).abs()).prod(-1)  # (N, Q, P)
        share = share * ((corner >= 0) & (corner < size)).all(-1)
        x, y = corner.clamp(min=0).minimum(size - 1).long().unbind(-1)
        found = cells.index_select(0, (first + y * width + x).flatten()).view(result.shape)
        result = result + found * share[..., None]
    return result.permute(0, 3, 1, 2)


def sum_of_samples(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, sample: Callable) -> Tensor:
    """`deform_attn` from a function that samples one level of the pyramid, see `grid_sample`."""
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        grids = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
        weights = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P)
        result = value.new_zeros((batch * heads, dim, queries), dtype=dtype)
        for level, part in enumerate(value.to(dtype).split([h * w for h, w in shapes], 1)):
            image = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, *shapes[level])  # (B*M, D, H, W)
            samples = sample(image, grids[:, :, level])  # (B*M, D, Q, P)
            result = result + (samples * weights[:, None, :, level]).sum(-1)
    return result.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


class MultiScaleDeformableAttention(nn.Module):
    """Each query reads a few points around its reference, on every level.

    Args:
        embed_dim: channels of queries and values; a multiple of `num_heads`.
        num_heads, num_levels, num_points: M, L and P.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m starts looking in direction m of the compass, point p at a distance of p + 1 cells, on all levels."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)[:, None]  # (P, 1)
        offsets = direction[:, None, None] * distance  # (M, 1, P, 2)
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, padding: Tensor | None, shapes: Shapes
    ) -> Tensor:
        """Attend from each query to the pyramid.

        Args:
            query: (B, Q, E).
            reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes (cx, cy, w, h), as fractions of each padded level.
            value: (B, S, E).
            padding: (B, S) bool, True on cells that read as zeros; None for no such cells.
            shapes: L pairs (H, W).

        Returns:
            (B, Q, E).
        """
        samples = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)  # (B, Q, M, L, P)
        value = self.value_proj(value)
        if padding is not None:
            fill = Tensor.masked_fill if torch.is_grad_enabled() else Tensor.masked_fill_  # see FeedForward.forward
            value = fill(value, padding[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D)
        logits = self.attention_weights(query).view(*samples[:3], -1)  # (B, Q, M, L*P)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        if use_compiled(value.device):
            fused = torch.ops.dino.deform_attn_fused_forward
            return self.output_proj(fused(value, flat(shapes), offsets, logits, reference))
        weights = logits.softmax(-1).view(samples)
        locations = self.sampling_locations(reference[:, :, None, :, None], offsets.to(reference.dtype), shapes)
        return self.output_proj(deform_attn(value, shapes, locations, weights))

    def sampling_locations(self, reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
        """Offsets count cells around a point, or P-ths of a half side around a box -> (B, Q, M, L, P, 2)."""
        if reference.shape[-1] == 2:
            return reference + offsets / extents(shapes, offsets)[:, None]
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
