"""Self-attention of queries with a bias for each pair of boxes: position relation (Relation-DETR, arXiv 2407.11699).

The bias of a head is `relu(bias + weight @ code)`. The code (64,) of a pair of boxes has the sines and cosines, at 8
frequencies each, of four numbers: `log(|dx| / w_i + 1)`, `log(|dy| / h_i + 1)`, `log(w_i / w_j)` and `log(h_i / h_j)`.

Codes and biases of all pairs would need several times the memory of the whole decoder. So the operator works on a few
rows of queries at a time and keeps nothing of size Q x Q for the backward pass, which computes them again. It needs no
sines for sizes: `sin(a_i - b_j)` and `cos(a_i - b_j)` are sums of products of a number of i and one of j, hence one
matrix product. Their phases are computed in float64, so that this is more accurate than the logarithm of a ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import to_float32
from .ops.operator import transformed

_EPS = 1e-5  # added to sizes
_SCALE = 100.0  # radians of the highest frequency
_TEMPERATURE = 10000.0
_FREQUENCIES = 8  # of each of the four numbers
_LENGTH = 4 * 2 * _FREQUENCIES  # of the code of a pair
_CHUNK = {"cpu": 2**20, "cuda": 2**25}  # sines and cosines at a time: what a cache holds; what keeps a GPU busy


class PositionRelation(nn.Module):
    """Attention with a bias for each pair of boxes and each head.

    At the start the weight is 0 and the bias 1. That is a constant, which changes no softmax, and which the ReLU lets
    pass with its gradient.

    Args:
        num_heads: M.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, _LENGTH))  # of four numbers, frequencies, sine and cosine
        self.bias = nn.Parameter(torch.ones(num_heads))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, source: Tensor, target: Tensor
    ) -> Tensor:
        """Attend, with the bias of row i and column j from box i of `source` and box j of `target`.

        Args:
            q, k, v: (B, M, Q, D) each.
            mask: (Q, Q), added to the scores; None for nothing.
            source, target: (B, Q, 4) boxes, which get no gradient.

        Returns:
            (B, M, Q, D).
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting() or transformed():  # operators that all of them know
            bias = self.pair_bias(source, target)
            bias = bias if mask is None else bias + mask
            if transformed():  # fused attention has no derivative by the bias there
                return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1).to(v.dtype) @ v
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return torch.ops.dino.relation_attention(q, k, v, mask, *self.factors(source, target))

    def pair_bias(self, source: Tensor, target: Tensor) -> Tensor:
        """Boxes (B, Q, 4) and (B, K, 4) -> the bias (B, M, Q, K) of every pair."""
        return _bias(*self.factors(source, target))[0].relu()

    def factors(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the bias of any rows and columns is made of, in the boxes' dtype.

        Args:
            source, target: (B, Q, 4) and (B, K, 4).

        Returns:
            source and target as (B, 4, Q, 1) and (B, 4, 1, K); the weight (2, M, 16) of sines and cosines of distances;
            rows (B, M, Q, 33) and columns (B, 33, K), whose product is the part of sizes and the constant.
        """
        source, target = (to_float32(boxes.detach()) for boxes in (source, target))
        target = target.to(source.dtype)
        weight = self.weight.to(source.dtype).view(-1, 4, _FREQUENCIES, 2).movedim(-1, 0)  # (2, M, 4, 8)
        distance, size = (part.flatten(2) for part in weight.split(2, 2))  # (2, M, 16) each
        sine, cosine = size[:, :, None].unbind()  # (M, 1, 16)
        sine_i, cosine_i = (x[:, None] for x in _sine_codes(source[..., 2:]))  # (B, 1, Q, 16)
        rows = [sine * sine_i + cosine * cosine_i, cosine * sine_i - sine * cosine_i]  # (B, M, Q, 16) each
        constant = self.bias.to(source.dtype)[:, None, None].expand_as(rows[0][..., :1])  # (B, M, Q, 1)
        sine_j, cosine_j = _sine_codes(target[..., 2:])  # (B, K, 16)
        columns = torch.cat([cosine_j, sine_j, torch.ones_like(sine_j[..., :1])], -1)
        return (
            source.mT.contiguous()[..., None],  # results of element-wise operations have the layout of what they read
            target.mT.contiguous()[:, :, None],
            distance,
            torch.cat([*rows, constant], -1),
            columns.mT,
        )


def _frequencies(like: Tensor) -> Tensor:
    """(8,) radians for a number of 1."""
    index = torch.arange(_FREQUENCIES, device=like.device, dtype=like.dtype)
    return _SCALE / _TEMPERATURE ** (index / _FREQUENCIES)


def _sine_codes(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes (B, Q, 2) -> sines and cosines (B, Q, 16) of their logarithms.

    The angles reach 1000 radians, of which float32 loses the fourth decimal place. Exported graphs stay in float32.
    """
    narrow = torch.jit.is_tracing() or torch.compiler.is_exporting() or sizes.device.type == "mps"
    logs = (sizes if narrow else sizes.double()).add(_EPS).log()
    angles = (logs[..., None] * _frequencies(logs)).flatten(2)
    return angles.sin().to(sizes.dtype), angles.cos().to(sizes.dtype)


def _bias(source: Tensor, target: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The bias (B, M, R, K) before the ReLU, and sines and cosines (B, 16, R*K) of distances.

    Args:
        source, target, weight, rows, columns: see `PositionRelation.factors`; of R source boxes.
    """
    logs = (source[:, :2] - target[:, :2]).abs_().div_(source[:, 2:] + _EPS).log1p_()  # (B, 2, R, K)
    angles = (logs[:, :, None] * _frequencies(logs)[:, None, None]).flatten(3).flatten(1, 2)
    codes = [angles.sin(), angles.cos_()]  # (B, 16, R*K) each
    bias = torch.bmm(rows.flatten(1, 2), columns).view(*rows.shape[:2], -1)  # (B, M, R*K)
    for part, code in zip(weight.unbind(), codes, strict=True):
        bias.baddbmm_(part.expand(code.shape[0], -1, -1), code)
    return bias.unflatten(2, (rows.shape[2], -1)), codes


# ---- the operator ----------------------------------------------------------------------------------------------------

_FACTORS = "Tensor source, Tensor target, Tensor weight, Tensor rows, Tensor columns"


def _chunks(source: Tensor, target: Tensor) -> Iterator[slice]:
    """Rows of queries that are computed at a time."""
    images, _, count, _ = source.shape
    size = _CHUNK.get(source.device.type, _CHUNK["cuda"])
    step = max(1, size // max(1, images * target.shape[-1] * _LENGTH // 2))
    return (slice(start, start + step) for start in range(0, count, step))


def _empty(q: Tensor) -> Tensor:
    """A tensor of the shape (B, M, Q, D) in the memory layout (B, Q, M, D), which the output projection reads."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _attention_weights(bias: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax (B*M, R, K) over the columns, given the bias (B, M, R, K) before the ReLU and mask (R, K).

    Args:
        q, k: (B*M, R, D), scaled; (B*M, K, D).
    """
    scores = bias.relu().flatten(0, 1).baddbmm_(q, k.mT)
    if mask is not None:
        scores += mask
    return scores.softmax(-1)


def _by_head(x: Tensor) -> Tensor:
    """(B, M, Q, D) -> (B*M, Q, D), in float32 or wider: as PyTorch's operators, which compute so inside."""
    return to_float32(x).flatten(0, 1)


@torch.library.custom_op(
    "dino::relation_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_FACTORS}) -> Tensor",
)
def _forward(q, k, v, mask, source, target, weight, rows, columns) -> Tensor:
    """Attention (B, M, Q, D) with the bias of `factors`."""
    output = _empty(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = _by_head(q) * q.shape[-1] ** -0.5, _by_head(k), _by_head(v)
        for part in _chunks(source, target):
            bias, _ = _bias(source[:, :, part], target, weight, rows[:, :, part], columns)
            weights = _attention_weights(bias, q[:, part], k, None if mask is None else mask[part])
            output[:, :, part] = torch.bmm(weights, v).view_as(output[:, :, part])
    return output


@torch.library.custom_op(
    "dino::relation_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, {_FACTORS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, q, k, v, mask, source, target, weight, rows, columns) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the weight and the rows."""
    inputs, scale = (q, k, v), q.shape[-1] ** -0.5
    with torch.autocast(q.device.type, enabled=False):
        grad, q, k, v = _by_head(grad), _by_head(q) * scale, _by_head(k), _by_head(v)
        by_q, by_rows = (x.new_empty(x.shape) for x in (q, rows))  # contiguous, as the fake tensors
        by_k, by_v, by_weight = (x.new_zeros(x.shape) for x in (k, v, weight))
        for part in _chunks(source, target):
            bias, codes = _bias(source[:, :, part], target, weight, rows[:, :, part], columns)
            weights = _attention_weights(bias, q[:, part], k, None if mask is None else mask[part])
            by_v.baddbmm_(weights.mT, grad[:, part])
            by_weights = torch.bmm(grad[:, part], v.mT)
            by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)  # (B*M, R, K)
            by_q[:, part] = torch.bmm(by_scores, k) * scale
            by_k.baddbmm_(by_scores.mT, q[:, part])
            by_bias = torch.ops.aten.threshold_backward(by_scores.view_as(bias), bias, 0)  # that of the ReLU
            for total, code in zip(by_weight, codes, strict=True):
                total += torch.bmm(by_bias.flatten(2), code.mT).sum(0)
            by_rows[:, :, part] = torch.bmm(by_bias.flatten(1, 2), columns.mT).view(*bias.shape[:3], -1)
    by_inputs = (by.view_as(x).to(x.dtype) for by, x in zip((by_q, by_k, by_v), inputs, strict=True))
    return *by_inputs, by_weight, by_rows


@_forward.register_fake
def _(q, *_) -> Tensor:
    return _empty(q)


@_backward.register_fake
def _(grad, q, k, v, mask, source, target, weight, rows, columns) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, weight, rows))


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor) -> tuple:
    by_q, by_k, by_v, by_weight, by_rows = torch.ops.dino.relation_attention_backward(grad, *ctx.saved_tensors)
    return by_q, by_k, by_v, None, None, None, by_weight, by_rows, None


_forward.register_autograd(_gradient, setup_context=_remember)
