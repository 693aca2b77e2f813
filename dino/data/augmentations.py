"""Augmentations of training images, by the names that recipes use: those of Detectron2, and `OneOf` and `ShortSide`.

They compute what Detectron2's do, and draw the same random numbers in the same order, from numpy's global generator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from dino.modeling.detector import resized_size

from .images import resize_image

# An image (H, W, 3) uint8 RGB and boxes (G, 4) xyxy in pixels -> the same two. Boxes may leave the image.
Augmentation = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _resize(image: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image to `size` (h, w), with its boxes."""
    (height, width), (new_height, new_width) = image.shape[:2], size
    return resize_image(image, size), boxes * np.tile([new_width / width, new_height / height], 2).astype(boxes.dtype)


def _blend(image: np.ndarray, other: np.ndarray | float, weight: float) -> np.ndarray:
    """`weight` parts of an image (H, W, 3) uint8 and 1 - `weight` of another, or of a grey value; clipped."""
    return np.clip((1 - weight) * other + weight * image.astype(np.float32), 0, 255).astype(np.uint8)


class _RandomFlip:
    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if horizontal == vertical:
            raise ValueError("RandomFlip: set horizontal or vertical, not both; use two for both")
        self.prob = prob
        self.axis = 1 if horizontal else 0  # of the image

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if np.random.uniform() >= self.prob:
            return image, boxes
        low, boxes = 1 - self.axis, boxes.copy()  # column of the smaller coordinate along the axis
        boxes[:, [low, low + 2]] = image.shape[self.axis] - boxes[:, [low + 2, low]]
        return np.flip(image, self.axis), boxes


class _RandomBrightness:
    def __init__(self, intensity_min: float, intensity_max: float):
        self.intensities = intensity_min, intensity_max

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _blend(image, 0.0, np.random.uniform(*self.intensities)), boxes


class _RandomContrast(_RandomBrightness):
    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _blend(image, image.mean(), np.random.uniform(*self.intensities)), boxes


class _RandomSaturation(_RandomBrightness):
    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = np.random.uniform(*self.intensities)
        return _blend(image, image.dot([0.299, 0.587, 0.114])[:, :, None], weight), boxes


class _RandomExtent:
    """Takes a rectangle of random size and place, which may exceed the image: black outside."""

    def __init__(self, scale_range: Sequence[float], shift_range: Sequence[float]):
        self.scale_range = tuple(scale_range)
        self.shift_range = tuple(shift_range)  # x, y, in shares of the image

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sides = np.array(image.shape[1::-1], dtype=float)  # (2,) x, y
        scale = np.random.uniform(*self.scale_range)
        shift = np.array([self.shift_range[i] * sides[i] * (np.random.rand() - 0.5) for i in (0, 1)])
        corners = np.concatenate([-0.5 * sides * scale + shift, 0.5 * sides * scale + shift]) + np.tile(0.5 * sides, 2)
        width, height = int(corners[2] - corners[0]), int(corners[3] - corners[1])
        picture = Image.fromarray(image).transform(
            (width, height), Image.Transform.EXTENT, tuple(corners), Image.Resampling.BILINEAR, fill=0
        )
        factors = np.array([width, height]) / (corners[2:] - corners[:2])
        middle = np.tile(0.5 * (corners[:2] + corners[2:]), 2)
        moved = (boxes - middle) * np.tile(factors, 2) + np.tile([0.5 * width, 0.5 * height], 2)
        return np.asarray(picture), moved.astype(np.float32)


class _RandomCrop:
    def __init__(self, crop_type: str, crop_size: Sequence[float]):
        if crop_type not in ("absolute", "absolute_range", "relative", "relative_range"):
            raise ValueError(f"RandomCrop: unknown crop_type {crop_type!r}")
        self.crop_type = crop_type
        self.crop_size = tuple(crop_size)

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sides = image.shape[:2]
        height, width = self._size(*sides)
        top, left = np.random.randint(sides[0] - height + 1), np.random.randint(sides[1] - width + 1)
        return image[top : top + height, left : left + width], boxes - np.array([left, top] * 2, dtype=boxes.dtype)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the crop of an image."""
        first, second = self.crop_size
        if self.crop_type == "absolute":
            return min(first, height), min(second, width)
        if self.crop_type == "absolute_range":
            return tuple(np.random.randint(min(side, first), min(side, second) + 1) for side in (height, width))
        shares = np.array(self.crop_size)
        if self.crop_type == "relative_range":
            shares = shares.astype(np.float32)
            shares = shares + np.random.rand(2) * (1 - shares)
        return int(height * shares[0] + 0.5), int(width * shares[1] + 0.5)


class _ResizeShortestEdge:
    def __init__(
        self, short_edge_length: int | Sequence[int], max_size: int = sys.maxsize, sample_style: str = "range"
    ):
        if sample_style not in ("range", "choice"):
            raise ValueError(f"ResizeShortestEdge: unknown sample_style {sample_style!r}")
        lengths = (short_edge_length,) * 2 if isinstance(short_edge_length, int) else tuple(short_edge_length)
        if sample_style == "range" and len(lengths) != 2:
            raise ValueError(f"ResizeShortestEdge: a range has two ends, not {len(lengths)}")
        self.lengths = lengths
        self.max_size = max_size
        self.sample_style = sample_style

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.sample_style == "range":
            short = np.random.randint(self.lengths[0], self.lengths[1] + 1)
        else:
            short = np.random.choice(self.lengths)
        if short == 0:
            return image, boxes
        sides = np.array(image.shape[:2])
        exact = sides * (float(short) / sides.min())
        exact[sides.argmin()] = short
        if exact.max() > self.max_size:
            exact = exact * (self.max_size / exact.max())
        height, width = (int(side + 0.5) for side in exact)
        return _resize(image, boxes, (height, width))


class _ShortSide:
    """See `dino.d2.data_loading.ShortSide`."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None):
        self.sizes = list(sizes)
        self.max_size = max_size

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = resized_size(*image.shape[:2], int(np.random.choice(self.sizes)), self.max_size)
        return _resize(image, boxes, size)


class _OneOf:
    """See `dino.d2.data_loading.OneOf`."""

    def __init__(self, branches: Sequence[Sequence[Augmentation]]):
        self.branches = [Augmentations(branch) for branch in branches]

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.branches[np.random.randint(len(self.branches))](image, boxes)


class Augmentations:
    """Several augmentations, one after the other.

    Args:
        parts: of `BY_NAME`.
    """

    def __init__(self, parts: Sequence[Augmentation]):
        self.parts = list(parts)

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """image (H, W, 3) uint8 RGB, boxes (G, 4) xyxy in pixels -> the same two; boxes may leave the image."""
        for part in self.parts:
            image, boxes = part(image, boxes)
        return image, boxes


BY_NAME: dict[str, Callable[..., Augmentation]] = {
    "OneOf": _OneOf,
    "RandomBrightness": _RandomBrightness,
    "RandomContrast": _RandomContrast,
    "RandomCrop": _RandomCrop,
    "RandomExtent": _RandomExtent,
    "RandomFlip": _RandomFlip,
    "RandomSaturation": _RandomSaturation,
    "ResizeShortestEdge": _ResizeShortestEdge,
    "ShortSide": _ShortSide,
}
