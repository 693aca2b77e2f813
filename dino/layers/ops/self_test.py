"""The self-test of the compiled operator: each kernel that people run, against the reference, before it is trusted.

`WIDTHS`, `LAYOUTS` and `FORMS` say which cases run. To cover the kernels of another head width, add a line to `WIDTHS`.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Shapes, deform_attn_reference, flat

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BATCH, HEADS = 2, 2
FAR = 1024.0  # cells: an offset that leads out of every level
FORMS = ("plain", "points", "boxes")

# Head width: types of `value`. DINO runs 32; 5 fits no vector and no fast kernel.
WIDTHS = {32: (F32, BF16, F16), 5: (F32, BF16, F16, F64)}

# Greatest difference over greatest magnitude. Values, gradients, offsets and logits are exact in every type; weights of
# the plain form and results are rounded.
BOUNDS = {F16: 2e-3, BF16: 1e-2, F32: 2e-5, F64: 1e-11}
PLACE_BOUNDS = {**BOUNDS, F32: 1e-4, F16: 4e-3, BF16: 2e-2}  # gradients of places, which are differences of values


class Layout(NamedTuple):
    """What surrounds the heads: queries None means one for each cell of the pyramid."""

    shapes: Shapes
    queries: int | None
    points: int


# On CUDA, queries that are cells are cut into tiles, forward of 8 x 8 and backward of 16 x 8; borders cut some of these
# off here. A few queries for many cells are the decoder's: backward goes from query to query. Both fill several blocks,
# and have more samples than a group of lanes prepares at a time. The deterministic backward makes lists of samples for
# both; some cells have several lists.
LAYOUTS = {
    "queries are cells": Layout([(9, 1), (1, 17), (2, 2)], None, 6),
    "few queries": Layout([(3, 22), (1, 20), (10, 1)], 67, 3),
}


class Example(NamedTuple):
    """Inputs and what they must give, in float64 on the CPU, for all forms at once.

    The locations of the three forms are the same, so one run of the reference serves them all, and every type.
    """

    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]  # "output", and the gradient of each input
    greatest: dict[str, float]  # magnitudes of `expected`


class Result(NamedTuple):
    """One tensor that an operator returned, and what it should have been."""

    where: str
    name: str
    actual: Tensor
    expected: Tensor
    bound: float  # of the difference


def run(operators, device: torch.device) -> None:
    """Compare `operators`, such as `torch.ops.dino`, with the reference.

    A thread of its own does the work, for it starts without anything that is bound to the caller's thread: autocast,
    inference mode, a default device, modes of tracing and exporting, vmap, streams. What is bound to the process is
    left as it is and avoided. Types are always named. The reference runs on the CPU: on CUDA, the backward of
    `grid_sample` refuses deterministic mode, which can't be left for a moment without other threads noticing.

    Raises:
        AssertionError: a wrong number.
        RuntimeError: the operators can't run now, for want of memory for example.
    """
    with ThreadPoolExecutor(1, "deform_attn_self_test") as thread:
        thread.submit(check, operators, device).result()


def check(operators, device: torch.device) -> None:
    """`run` in this thread."""
    with torch.no_grad():
        for width, dtypes in WIDTHS.items():
            for name in LAYOUTS:
                for dtype in dtypes:
                    compare(list(results_of(operators, device, name, width, dtype)))
            check_order(operators, device, width)


@functools.cache
def example_of(name: str, width: int) -> Example:
    """The example of a layout. Kept, so that a self-test that had to stop is quick when it runs again."""
    shapes, queries, points = LAYOUTS[name]
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    queries = queries or tokens
    generator = torch.Generator("cpu").manual_seed(width)  # the state of the process's own is left alone

    def whole(most: int, *size: int) -> Tensor:
        """Whole numbers from -most to most: with few bits, so that every type holds them exactly."""
        return torch.randint(-most, most + 1, size, generator=generator, dtype=F64, device="cpu")

    value = whole(64, BATCH, tokens, HEADS, width) / 64
    logits = whole(40, BATCH, queries, HEADS, levels * points) / 16
    cells = whole(24, BATCH, queries, HEADS, levels, points, 2) / 8  # offsets, in cells
    cells[:, ::5, :, :, 0] = FAR
    extent = torch.tensor([(w, h) for h, w in shapes], dtype=F64, device="cpu")  # (L, 2)
    corner = whole(1 << 20, BATCH, queries, levels, 2) % extent  # whole cells
    # A sixteenth beside the centre of a cell, and offsets of eighths: no sample lies where the gradient jumps.
    centre = (corner + 0.5 + 1 / 16) / extent
    factor = 2.0 ** whole(1, BATCH, queries, levels, 2)  # cells that an offset of one is worth in the form of boxes
    reference = torch.cat([centre, factor * (2 * points) / extent], -1)  # (B, Q, L, 4)
    offsets = cells / factor[:, :, None, :, None]
    grad = whole(64, BATCH, queries, HEADS * width) / 64
    return solve(shapes, {"value": value, "offsets": offsets, "logits": logits, "reference": reference, "grad": grad})


def solve(shapes: Shapes, inputs: dict[str, Tensor]) -> Example:
    """The reference's answers, and the inputs that differ between the forms."""
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
    given["locations"] = given["locations"].masked_fill(given["cells"] == FAR, torch.nan)  # no place: outside as well
    expected = {"output": output.detach(), **dict(zip(names, gradients, strict=True))}
    given["point"], expected["point"] = given["reference"][..., :2], expected["reference"][..., :2]
    greatest = {name: x.abs().max().item() for name, x in expected.items()}
    return Example({**given, "grad": inputs["grad"]}, expected, greatest)


ARGUMENTS = {
    "plain": ("value", "locations", "weights"),
    "points": ("value", "cells", "logits", "point"),
    "boxes": ("value", "offsets", "logits", "reference"),
}
WIDE = ("locations", "point", "reference")  # kept in float32 where values are of a half type


def arguments_of(example: Example, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The inputs of all forms, in the types in which people hand them over."""
    wide = torch.promote_types(dtype, F32)
    return {name: x.to(device, wide if name in WIDE else dtype) for name, x in example.inputs.items()}


def operator_of(operators, form: str, suffix: str):
    """One of the six operators of a namespace."""
    return getattr(operators, f"deform_attn{'_fused' * (form != 'plain')}_{suffix}")


def results_of(operators, device: torch.device, name: str, width: int, dtype: torch.dtype) -> Iterator[Result]:
    """Every form, forward and both backwards."""
    example, shapes = example_of(name, width), flat(LAYOUTS[name].shapes)
    given = arguments_of(example, dtype, device)
    where = f"head width {width}, {str(dtype).removeprefix('torch.')}, {name}"

    def result(title: str, argument: str, actual: Tensor) -> Result:
        bound = (BOUNDS if argument in ("output", "value") else PLACE_BOUNDS)[dtype] * example.greatest[argument]
        return Result(where, f"{title}: {argument}", actual, example.expected[argument], bound)

    for form in FORMS:
        value, *others = (given[argument] for argument in ARGUMENTS[form])
        yield result(f"{form} form", "output", operator_of(operators, form, "forward")(value, shapes, *others))
        for suffix in ("backward", "backward_deterministic"):
            gradients = operator_of(operators, form, suffix)(given["grad"], value, shapes, *others)
            for argument, x in zip(ARGUMENTS[form], gradients, strict=True):
                yield result(f"{form} form, {suffix}", argument, x)


def check_order(operators, device: torch.device, width: int) -> None:
    """Raise an AssertionError if the sums of long lists differ by a bit between two deterministic runs."""
    name = "queries are cells"
    given = arguments_of(example_of(name, width), F32, device)
    value, *others = (given[argument] for argument in ARGUMENTS["plain"])
    backward = operator_of(operators, "plain", "backward_deterministic")
    first, second = (backward(given["grad"], value, flat(LAYOUTS[name].shapes), *others)[0] for _ in range(2))
    if not torch.equal(first, second):
        raise AssertionError(f"plain form: two deterministic runs differ (head width {width}, float32, {name})")


def compare(results: list[Result]) -> None:
    """Raise an AssertionError that names a wrong result. A copy to the CPU for each type, not for each tensor."""
    for dtype in {result.actual.dtype for result in results}:
        some = [result for result in results if result.actual.dtype == dtype]
        wide = torch.promote_types(dtype, F32)
        actual = torch.cat([result.actual.flatten() for result in some]).to("cpu", wide)
        expected = torch.cat([result.expected.flatten() for result in some]).to(wide)
        sizes = torch.tensor([result.expected.numel() for result in some], device="cpu")
        bounds = torch.tensor([result.bound for result in some], dtype=wide, device="cpu")
        right = (actual - expected).abs_() <= bounds.repeat_interleave(sizes)  # a NaN is never right
        if not right.all():
            name_the_worst(some, actual.split(sizes.tolist()))


def name_the_worst(results: list[Result], actual: tuple[Tensor, ...]) -> None:
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
