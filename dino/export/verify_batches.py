"""Batches on which an exported program is compared, beside pictures alone: padded, of delicate, smallest, largest size.

A cell of a level is padding where the pixel in its upper left corner is. At some sizes, the delicate ones, programs
that look for this pixel by float32 division take the one before: the mask of a picture that ends there changes.
ONNX Runtime's nearest-neighbour resize does so at 240, 480, 600 and 750 pixels, for example: in 636 of 15,868 pairs of
side (to 1,400 pixels) and number of cells (strides 4 to 128, rounded up or down). PyTorch's, which the official program
uses, never does where levels round up, as ResNet's; it does in 140 of 7,468 pairs where they round down, as ConvNeXt's:
454 pixels with stride 32, for example. There this network, which computes with integers, differs from the official one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dino.data.images import resize_image
from dino.modeling.detector import resized_size

from .export_wrapper import Fixed, Prepared

_SHARES = (1.0, 0.8, 0.65, 0.9)  # of the full size, for the pictures of a padded batch
_PREFERRED = 0.75  # of the short side: where delicate sizes are looked for, since large ones take long

Cells = Callable[[int], list[int]]  # side of a batch in pixels -> number of cells of each level along it


class Batch(NamedTuple):
    """Sizes of a batch: a file that takes any size gets it as one batch, then picture by picture with equal padding."""

    kind: str
    canvas: tuple[int, int]  # height and width of all
    sizes: list[tuple[int, int]]  # of each picture, in the upper left corner
    first: int = 0  # number of the first picture

    def __str__(self) -> str:
        return f"{_text(self.canvas)} with pictures of {', '.join(map(_text, self.sizes))}"

    def fill(self, pictures: Sequence[np.ndarray]) -> Prepared:
        """Put as many pictures (h, w, 3) uint8 of any shapes into the batch, resized to its sizes."""
        images = np.zeros((len(self.sizes), 3, *self.canvas), np.uint8)
        for part, picture, (height, width) in zip(images, pictures, self.sizes, strict=True):
            part[:, :height, :width] = resize_image(picture, (height, width)).transpose(2, 0, 1)
        return Prepared(images, np.array(self.sizes, np.int64))

    def singly(self) -> list[Batch]:
        """The same pictures one by one, each with the padding that it has in the batch."""
        kind = f"{self.kind}, one by one"
        return [Batch(kind, self.canvas, [size], self.first + i) for i, size in enumerate(self.sizes)]


def plan(
    network: nn.Module, resize: dict[str, Any], shapes: Sequence[tuple[int, int]], fixed: Fixed | None
) -> list[Batch]:
    """List the batches to compare.

    Args:
        network: the `DINO`.
        resize: the rule, see `prepare`.
        shapes: height and width of the pictures; with fewer than four, they are repeated.
        fixed: the only size that the program takes.
    """
    strides = network_strides(network)
    cells = cells_of(network, strides)
    shapes = [shapes[i % len(shapes)] for i in range(len(_SHARES))]
    if fixed:
        return list(_of_one_size(fixed, cells, shapes))
    made = [*_of_any_size(resize, shapes, strides[-1] + 1), *_delicate(resize, cells, strides)]
    return [part for batch in made for part in (batch, *batch.singly())]


def network_strides(network: nn.Module) -> list[int]:
    """Width of a cell of each level in pixels, the finest first."""
    neck = network.neck
    shapes = neck.backbone.output_shape()
    strides = [shapes[name].stride for name in neck.in_features]
    return strides + [strides[-1] * 2**i for i in range(1, len(neck.extra_levels) + 1)]


@torch.no_grad()
def cells_of(network: nn.Module, strides: Sequence[int]) -> Cells:
    """Find out on one small image whether the levels round up, as ResNet's, or down."""
    side = 2 * strides[-1] - 1
    maps = network.neck(network.level_embed.new_zeros(1, 3, side, side))
    up = [m.shape[-1] == -(-side // stride) for m, stride in zip(maps, strides, strict=True)]
    return lambda side: [-(-side // n) if ceil else side // n for n, ceil in zip(strides, up, strict=True)]


def delicate_ends(side: int, cells: int) -> list[int]:
    """First pixels of cells along a side, in pixels, for which float32 division gives the pixel before."""
    index = np.arange(cells)
    exact = index * side // max(cells, 1)
    steps = index.astype(np.float32)
    by_ratio = np.floor(steps / (np.float32(cells) / np.float32(side)))  # ONNX Runtime
    by_step = np.floor(steps * (np.float32(side) / np.float32(max(cells, 1))))  # PyTorch
    return exact[(by_ratio != exact) | (by_step != exact)].tolist()


def _of_any_size(resize: dict[str, Any], shapes: Sequence[tuple[int, int]], lowest: int) -> Iterator[Batch]:
    """Padded batches of 2 and 4, the smallest and the largest size; no side of a batch is below `lowest`."""
    short, longest = resize["short_side"], resize["max_size"]
    full = [resized_size(*shape, short, longest) for shape in shapes]
    sizes = [_shrink(size, share) for size, share in zip(full, _SHARES, strict=True)]
    for count in (2, 4):
        canvas = tuple(max(lowest, *sides) for sides in zip(*sizes[:count], strict=True))
        yield Batch(f"padded batch of {count}", canvas, sizes[:count])
    for kind, side in (("smallest size", short), ("largest size", longest or 2 * short)):
        canvas = (max(lowest, short), max(lowest, side))
        yield Batch(kind, canvas, [canvas, _shrink(canvas, _SHARES[1])])


def _delicate(resize: dict[str, Any], cells: Cells, strides: Sequence[int]) -> Iterator[Batch]:
    """For each level a square batch of a delicate size, with pictures that end at the delicate pixel and after it."""
    short = resize["short_side"]
    wanted = max(_PREFERRED * short, strides[-1] + 1)
    sides = set(range(strides[-1] + 1, max(resize["max_size"] or 2 * short, 4 * strides[-1])))
    for level in range(len(strides)):
        found = [(side, ends[-1]) for side in sorted(sides) if (ends := delicate_ends(side, cells(side)[level]))]
        if found:
            side, end = min(found, key=lambda pair: abs(pair[0] / wanted - 1) + 1 - pair[1] / pair[0])
            sides.remove(side)
            yield Batch("delicate sizes", (side, side), [(side, side), (end, end), (end + 1, end + 1)])


def _of_one_size(fixed: Fixed, cells: Cells, shapes: Sequence[tuple[int, int]]) -> Iterator[Batch]:
    """Batches of the only size, with pictures of several shares of it, and such that end where a cell begins."""
    canvas = (fixed.height, fixed.width)
    fit = [min(canvas[0] / height, canvas[1] / width) for height, width in shapes]
    padded = [_shrink(shape, share * ratio) for shape, share, ratio in zip(shapes, _SHARES, fit, strict=True)]
    ends = [[*dict.fromkeys(_ends(side, cells(side)))] for side in canvas]
    delicate = [(y, x) for y, x in zip(*(_repeat(e, max(map(len, ends))) for e in ends), strict=True)]
    delicate += [(min(y + 1, fixed.height), min(x + 1, fixed.width)) for y, x in delicate]
    for kind, sizes in (("padded pictures", padded), ("delicate sizes", delicate)):
        for start in range(0, len(sizes), fixed.batch):
            yield Batch(kind, canvas, _repeat(sizes[start : start + fixed.batch], fixed.batch), start)


def _ends(side: int, cells: Sequence[int]) -> list[int]:
    """One pixel of each level: the last delicate one, else the first of the last cell."""
    return [max([*delicate_ends(side, count), 0]) or max(1, (count - 1) * side // max(count, 1)) for count in cells]


def _shrink(size: tuple[int, int], share: float) -> tuple[int, int]:
    """`size` times `share`, in whole pixels."""
    return tuple(max(1, int(side * share + 0.5)) for side in size)


def _repeat(values: Sequence, count: int) -> list:
    """`count` values: `values` again and again."""
    return [values[i % len(values)] for i in range(count)]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
