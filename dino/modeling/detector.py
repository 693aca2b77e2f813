"""`Detector`: a network together with what it expects of images and the choice of its detections. Torch only."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino.layers.boxes import xyxy_to_cxcywh
from dino.layers.criterion import call_criterion, global_loss_normalizer
from dino.layers.matcher import NonFiniteCostError
from dino.layers.postprocess import detections
from dino.structures import Detections, Outputs, Target
from dino.utils.device import to_device

from .cuda_graphs import CudaGraphs
from .dino import DINO
from .variants.criteria import check_criterion

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, values 0 to 255

# logits (B, Q, C), boxes (B, Q, 4), sizes (B, 2) in pixels, number of detections -> Detections with B in front
Select = Callable[[Tensor, Tensor, Tensor | Sequence, int], Detections]


class Preprocessing(NamedTuple):
    """What a network expects of its images, which are RGB.

    Args:
        pixel_mean, pixel_std: of the channels, for values from 0 to 255.
        short_side: length in pixels to which the shorter side is resized,
        max_size: unless the longer one would exceed this; None for no bound.
        max_detections: per image.
        input_range: values (low, high) of deep grey files that become 0 and 255, see `read_image`; None: by their type.
    """

    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    short_side: int = 800
    max_size: int | None = 1333
    max_detections: int = 300
    input_range: tuple[float, float] | None = None


_PUBLISHED = Preprocessing()  # of the published models


class Detector(nn.Module):
    """A network, its preprocessing, its class names and the choice of its detections.

    Args:
        network: the `DINO`.
        preprocessing: what the network expects of its images, and the number of detections.
        names: of the classes.
        category_ids: of the classes in the data set, label -> id; 1, 2, … by default.
        criterion: (Outputs, targets) -> dict of losses, see `SetCriterion`; needed for training only.
        select: chooses the detections: `dino.layers.detections`, or `one_label_detections`, which gives no box two
            labels.
        graphs: run in place of the network in `detect`, for speed.

    Raises:
        UserError: network and criterion do not fit, see `check_criterion`.
    """

    def __init__(
        self,
        network: DINO,
        preprocessing: Preprocessing = _PUBLISHED,
        names: Sequence[str] = (),
        *,
        category_ids: Sequence[int] = (),
        criterion: nn.Module | None = None,
        select: Select = detections,
        graphs: CudaGraphs | None = None,
    ):
        super().__init__()
        if criterion is not None:
            check_criterion(criterion, network)
        self.network = network
        self.criterion = criterion
        self.preprocessing = preprocessing
        self.names = list(names)
        self.category_ids = list(category_ids) or list(range(1, len(self.names) + 1))
        self.select = select
        self.graphs = graphs
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(list(getattr(preprocessing, name)), dtype=torch.float32)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.level_embed.device

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, **loss_options):
        """Compute `losses` with targets, `detect` without."""
        return self.detect(images) if targets is None else self.losses(images, targets, **loss_options)

    def losses(
        self, images: Sequence[Tensor], targets: Sequence[Target], *, sources: Sequence[str] = (), **loss_options
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of a batch; their sum is the training loss.

        Args:
            images: B images (3, h, w) of any sizes, RGB, values 0 to 255.
            targets: objects of each image.
            sources: what an error message calls each image.
            loss_options: `normalizer`, `non_finite` and `metrics`, see `SetCriterion.forward` and `call_criterion`.

        Raises:
            FloatingPointError: a matching cost is NaN or infinite; names the image.
        """
        targets = [Target(*(to_device(x, self.device) for x in target)) for target in targets]
        outputs = self.network(*self.batch(images), targets)
        try:
            return call_criterion(self.criterion, outputs, targets, **loss_options)
        except NonFiniteCostError as error:
            called = [_name(sources, i) for i in range(len(images))]
            raise FloatingPointError(
                f"non-finite predictions for {called[error.image]} (batch: {', '.join(called)})"
            ) from error

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        sources: Sequence[str] = (),
        batch_size: int | None = None,
    ) -> list[Detections]:
        """Detect in each image; images of equal size run together.

        Images of unequal size are never padded to each other: padding reaches GroupNorm and the borders of
        convolutions, where the padding mask has no effect. So a result does not depend on the batch.

        Args:
            images: each (3, h, w), RGB, values 0 to 255, already resized, see `size`.
            sizes: height and width in pixels of the picture that the boxes refer to; those of the image by default.
            sources: what an error message calls each image.
            batch_size: most images that run together; no bound by default.

        Returns:
            for each image the detections on the device of the network, not clipped, best first.

        Raises:
            FloatingPointError: a prediction is NaN or infinite; names the image.
        """
        sizes = [tuple(image.shape[1:]) for image in images] if sizes is None else sizes
        run = self.graphs or self.network
        results: dict[int, Detections] = {}
        for indices in _equal_sizes(images, batch_size):
            found = self.postprocess(run(*self.batch([images[i] for i in indices])), [sizes[i] for i in indices])
            _check_finite(found, [_name(sources, i) for i in indices])
            results |= zip(indices, map(Detections, *found), strict=True)
        return [results[i] for i in range(len(images))]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to which an image of this size is resized before it is given to `detect`."""
        return resized_size(height, width, self.preprocessing.short_side, self.preprocessing.max_size)

    def batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Images (3, h, w) of any sizes -> the arguments of `DINO.forward`: (B, 3, H, W), and `padding` or None."""
        images = [to_device(image, self.device) for image in images]
        sizes = [tuple(image.shape[1:]) for image in images]
        if len(set(sizes)) == 1:
            return self.normalize(torch.stack(images)), None
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        dtype = functools.reduce(torch.promote_types, (image.dtype for image in images))
        canvas = torch.zeros(len(images), 3, height, width, dtype=dtype, device=self.device)
        for part, image, (h, w) in zip(canvas, images, sizes, strict=True):
            part[:, :h, :w] = image
        return self.pad(canvas, to_device(sizes, self.device))

    def pad(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise images and make their padding zero.

        Args:
            images: (B, 3, H, W), each image in the upper left corner; values outside do not matter.
            sizes: (B, 2) int64, height and width of each image in pixels.

        Returns:
            images (B, 3, H, W); padding (B, H, W) bool, True where padded.
        """
        row = torch.arange(images.shape[2], device=images.device)[:, None]  # (H, 1)
        column = torch.arange(images.shape[3], device=images.device)  # (W,)
        padding = (row >= sizes[:, :1, None]) | (column >= sizes[:, 1:, None])  # (B, H, W)
        return self.normalize(images).masked_fill(padding[:, None], 0), padding

    def normalize(self, images: Tensor) -> Tensor:
        """(..., 3, H, W), values 0 to 255 -> mean 0 and deviation 1 of each channel, in the dtype of the network."""
        mean, std = to_device(self.pixel_mean, images.device), to_device(self.pixel_std, images.device)
        return ((images - mean) / std).to(self.network.level_embed.dtype)

    def postprocess(self, outputs: Outputs, sizes: Tensor | Sequence[tuple[int, int]]) -> Detections:
        """Predictions of the last layer -> Detections with B in front, in pixels of pictures of `sizes` (B, 2)."""
        logits, boxes = outputs.decoder.logits[-1], outputs.decoder.boxes[-1]  # (B, Q, C), (B, Q, 4)
        return self.select(logits, boxes, sizes, self.preprocessing.max_detections)

    def loss_normalizer(self, counts: Sequence[int]) -> Tensor:
        """Number of objects by which losses are divided, over all processes: a (2,) tensor for `losses`.

        Args:
            counts: objects of each image of the whole batch, all its parts together.
        """
        num_denoised = self.network.denoising.num_denoised(counts)
        return global_loss_normalizer(sum(counts), num_denoised, self.device)

    @contextmanager
    def replay(self, most: int) -> Iterator[None]:
        """Let `detect` replay CUDA graphs of at most `most` sizes within the block; of none where that is 0."""
        before, self.graphs = self.graphs, CudaGraphs(self.network, most=most) if most else None
        try:
            yield
        finally:
            self.graphs = before


def resized_size(height: int, width: int, short_side: int, max_size: int | None) -> tuple[int, int]:
    """New (height, width) for a short side of `short_side` pixels and a long one of `max_size` at most.

    Rounds as the official program does (torchvision's truncation), which differs from Detectron2's by a pixel. The long
    side of an extreme shape, such as 65,535 x 1, is shrunk beyond its ratio: to 2 * max_size, or 128 short sides.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(1, round(max_size * short / long))
    other = long if short == short_side else max(1, int(short_side * long / short))
    other = min(other, 128 * short_side if max_size is None else 2 * max_size)
    return (short_side, other) if height <= width else (other, short_side)


def to_target(labels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Target:
    """Labels (G,) int64 and boxes (G, 4), xyxy in pixels of an image of `size` (height, width) -> Target."""
    height, width = size
    return Target(labels, xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height]))


def _equal_sizes(images: Sequence[Tensor], batch_size: int | None) -> Iterator[list[int]]:
    """Indices of images that run together."""
    groups = defaultdict(list)
    for index, image in enumerate(images):
        groups[image.shape].append(index)
    for group in groups.values():
        step = batch_size or len(group)
        yield from (group[start : start + step] for start in range(0, len(group), step))


def _check_finite(found: Detections, called: Sequence[str]) -> None:
    """Raise a FloatingPointError that names an image with NaN or infinite detections, in one device sync."""
    finite = (found.scores.isfinite() & found.boxes.isfinite().all(-1)).all(-1)  # (B,)
    for name, good in zip(called, finite.tolist(), strict=True):
        if not good:
            raise FloatingPointError(f"{name}: the predictions are NaN or infinite, probably so are the weights")


def _name(sources: Sequence[str], index: int) -> str:
    return sources[index] if sources else f"image {index} of the batch"
