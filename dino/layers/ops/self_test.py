"""The self-test of the compiled operator: compares each kernel with the reference before its first use.

`_WIDTHS`, `_LAYOUTS` and `_FORMS` list the cases. To cover the kernels of another head width, add a line to `_WIDTHS`.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Shapes, deform_attn_reference, flat

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
_BATCH, _HEADS = 2, 2
_FAR = 1024.0  # cells: an offset out of every level
_FORMS = ("plain", "points", "boxes")

# Head width: types of `value`. DINO runs 32; 5 fits no vector and no fast kernel.
_WIDTHS = {32: (F32, BF16, F16), 5: (F32, BF16, F16, F64)}

# Greatest difference over greatest magnitude. Values, gradients, offsets and logits are exact in every type; weights of
# the plain form and results are rounded.
_BOUNDS = {F16: 2e-3, BF16: 1e-2, F32: 2e-5, F64: 1e-11}
_LOCATION_BOUNDS = {
    **_BOUNDS,
    F32: 1e-4,
    F16: 4e-3,
    BF16: 2e-2,
}  # gradients: differences of values


class _Layout(NamedTuple):
    """Levels, queries and points of a case; queries None: one for each cell of the pyramid."""

    shapes: Shapes
    queries: int | None
    points: int


# On CUDA, queries that are cells are cut into tiles, forward of 8 x 8 and backward of 16 x 8; borders cut some of these
# off here. A few queries for many cells are the decoder's: backward goes from query to query. Both fill several blocks,
# and have more samples than a group of lanes prepares at a time. The deterministic backward makes lists of samples for
# both; some cells have several lists.
_LAYOUTS = {
    "queries are cells": _Layout([(9, 1), (1, 17), (2, 2)], None, 6),
    "few queries": _Layout([(3, 22), (1, 20), (10, 1)], 67, 3),
}


class _Example(NamedTuple):
    """Inputs and expected results, in float64 on the CPU, for all forms.

    The three forms have the same locations, so one run of the reference is enough for all forms and types.
    """

    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]  # "output", and the gradient of each input
    greatest: dict[str, float]  # magnitudes of `expected`


class _Result(NamedTuple):
    """One tensor that an operator returned, and the expected one."""

    where: str
    name: str
    actual: Tensor
    expected: Tensor
    bound: float  # of the difference


def run(operators, device: torch.device) -> None:
    """Compare `operators`, such as `torch.ops.dino`, with the reference.

    A new thread does the work, because it starts without the state of the caller's thread: autocast, inference mode, a
    default device, modes of tracing and exporting, vmap, streams. State of the process stays as it is, and is avoided:
    types are always named, and the reference runs on the CPU. On CUDA, the backward of `grid_sample` refuses
    deterministic mode, and leaving that mode for a moment would affect other threads.

    Raises:
        AssertionError: a wrong number.
        RuntimeError: the operators can't run now, for example because memory ran out.
    """
    with ThreadPoolExecutor(1, "deform_attn_self_test") as thread:
        thread.submit(_check, operators, device).result()


def _check(operators, device: torch.device) -> None:
    """`run` in this thread."""
    with torch.no_grad():
        for width, dtypes in _WIDTHS.items():
            for name in _LAYOUTS:
                for dtype in dtypes:
                    _compare(list(_results_of(operators, device, name, width, dtype)))
            _check_order(operators, device, width)


@functools.cache
def _example_of(name: str, width: int) -> _Example:
    """The example of a layout; cached, so that a repeated self-test is quick."""
    shapes, queries, points = _LAYOUTS[name]
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    queries = queries or tokens
    generator = torch.Generator("cpu").manual_seed(width)  # the generator of the process keeps its state

    def whole(most: int, *size: int) -> Tensor:
        """Whole numbers from -most to most: with few bits, so that every type holds them exactly."""
        return torch.randint(-most, most + 1, size, generator=generator, dtype=F64, device="cpu")

    value = whole(64, _BATCH, tokens, _HEADS, width) / 64
    logits = whole(40, _BATCH, queries, _HEADS, levels * points) / 16
    cells = whole(24, _BATCH, queries, _HEADS, levels, points, 2) / 8  # offsets, in cells
    cells[:, ::5, :, :, 0] = _FAR
    extent = torch.tensor([(w, h) for h, w in shapes], dtype=F64, device="cpu")  # (L, 2)
    corner = whole(1 << 20, _BATCH, queries, levels, 2) % extent  # whole cells
    # A sixteenth beside the centre of a cell, and offsets of eighths: no sample lies where the gradient jumps.
    centre = (corner + 0.5 + 1 / 16) / extent
    factor = 2.0 ** whole(1, _BATCH, queries, levels, 2)  # cells that an offset of one is worth in the form of boxes
    reference = torch.cat([centre, factor * (2 * points) / extent], -1)  # (B, Q, L, 4)
    offsets = cells / factor[:, :, None, :, None]
    grad = whole(64, _BATCH, queries, _HEADS * width) / 64
    return _solve(shapes, {"value": value, "offsets": offsets, "logits": logits, "reference": reference, "grad": grad})


def _solve(shapes: Shapes, inputs: dict[str, Tensor]) -> _Example:
    """Compute the expected results by the reference, and the inputs that differ between the forms."""
    value, offsets, logits, reference = leaves = [
        inputs[name].requires_grad_() for name in ("value", "offsets", "logits", "reference")
    ]
    extent = torch.tensor([(w, h) for h, w in shapes], dtype=F64, device="cpu")  # (L, 2)
    points = offsets.shape[-2]
    with torch.enable_grad():
        boxes = reference[:, :, None, :, None]
        cells = offsets * (boxes[..., 2:] * extent[:, None] / (2 * points))
        locations = boxes[..., :2] + cells / extent[:, None]
        weights = logits.softmax(-1).view(offsets.shape[:-1])
        output = deform_attn_reference(value, shapes, locations, weights)
        sources = [*leaves, cells, locations, weights]
        gradients = torch.autograd.grad(output, sources, inputs["grad"])
    names = ["value", "offsets", "logits", "reference", "cells", "locations", "weights"]
    given = dict(zip(names, (x.detach() for x in sources), strict=True))
    given["locations"] = given["locations"].masked_fill(given["cells"] == _FAR, torch.nan)  # a NaN lies outside too
    expected = {"output": output.detach(), **dict(zip(names, gradients, strict=True))}
    given["point"], expected["point"] = given["reference"][..., :2], expected["reference"][..., :2]
    greatest = {name: x.abs().max().item() for name, x in expected.items()}
    return _Example({**given, "grad": inputs["grad"]}, expected, greatest)


_ARGUMENTS = {
    "plain": ("value", "locations", "weights"),
    "points": ("value", "cells", "logits", "point"),
    "boxes": ("value", "offsets", "logits", "reference"),
}
_WIDE = ("locations", "point", "reference")  # kept in float32 where values are of a half type


def _arguments_of(example: _Example, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The inputs of all forms, in the types of real calls."""
    wide = torch.promote_types(dtype, F32)
    return {name: x.to(device, wide if name in _WIDE else dtype) for name, x in example.inputs.items()}


def _operator_of(operators, form: str, suffix: str):
    """One of the six operators of a namespace."""
    return getattr(operators, f"deform_attn{'_fused' * (form != 'plain')}_{suffix}")


def _results_of(operators, device: torch.device, name: str, width: int, dtype: torch.dtype) -> Iterator[_Result]:
    """Run every form, forward and both backwards."""
    example, shapes = _example_of(name, width), flat(_LAYOUTS[name].shapes)
    given = _arguments_of(example, dtype, device)
    where = f"head width {width}, {str(dtype).removeprefix('torch.')}, {name}"

    def result(title: str, argument: str, actual: Tensor) -> _Result:
        bound = (_BOUNDS if argument in ("output", "value") else _LOCATION_BOUNDS)[dtype] * example.greatest[argument]
        return _Result(where, f"{title}: {argument}", actual, example.expected[argument], bound)

    for form in _FORMS:
        value, *others = (given[argument] for argument in _ARGUMENTS[form])
        yield result(f"{form} form", "output", _operator_of(operators, form, "forward")(value, shapes, *others))
        for suffix in ("backward", "backward_deterministic"):
            gradients = _operator_of(operators, form, suffix)(given["grad"], value, shapes, *others)
            for argument, x in zip(_ARGUMENTS[form], gradients, strict=True):
                yield result(f"{form} form, {suffix}", argument, x)


def _check_order(operators, device: torch.device, width: int) -> None:
    """Raise an AssertionError if two deterministic runs differ in a bit of their sums of long lists."""
    name = "queries are cells"
    given = _arguments_of(_example_of(name, width), F32, device)
    value, *others = (given[argument] for argument in _ARGUMENTS["plain"])
    backward = _operator_of(operators, "plain", "backward_deterministic")
    first, second = (backward(given["grad"], value, flat(_LAYOUTS[name].shapes), *others)[0] for _ in range(2))
    if not torch.equal(first, second):
        raise AssertionError(f"plain form: two deterministic runs differ (head width {width}, float32, {name})")


def _compare(results: list[_Result]) -> None:
    """Raise an AssertionError that names a wrong result. Copies to the CPU once for each type, not for each tensor."""
    for dtype in {result.actual.dtype for result in results}:
        some = [result for result in results if result.actual.dtype == dtype]
        wide = torch.promote_types(dtype, F32)
        actual = torch.cat([result.actual.flatten() for result in some]).to("cpu", wide)
        expected = torch.cat([result.expected.flatten() for result in some]).to(wide)
        sizes = torch.tensor([result.expected.numel() for result in some], device="cpu")
        bounds = torch.tensor([result.bound for result in some], dtype=wide, device="cpu")
        right = (actual - expected).abs_() <= bounds.repeat_interleave(sizes)  # a NaN is never right
        if not right.all():
            _name_the_worst(some, actual.split(sizes.tolist()))


def _name_the_worst(results: list[_Result], actual: tuple[Tensor, ...]) -> None:
    """Raise the AssertionError for the result that is farthest beyond its bound."""
    worst, number = 0.0, 0
    for i, (result, x) in enumerate(zip(results, actual, strict=True)):
        excess = ((x - result.expected.flatten()).abs().max() / result.bound).nan_to_num(nan=torch.inf).item()
        if excess > worst:
            worst, number = excess, i
    result = results[number]
    raise AssertionError(
        f"{result.name} differs from the reference by {worst * result.bound:.3g}, "
        f"but may by {result.bound:.3g} ({result.where})"
    )
