"""Several training images in one: a mosaic of four, and a mixture of two (Dense O2O of DEIM, arXiv 2412.04234).

More objects in an image give a one-to-one matching more positive queries. Random numbers come from a generator that the
caller passes, apart from those of other augmentations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from dino.modeling.detector import resized_size
from dino.utils.files import UserError

from .images import resize_image


class Picture(NamedTuple):
    """An image with its objects, before augmentation."""

    image: np.ndarray  # (H, W, 3) uint8
    boxes: np.ndarray  # (G, 4) float64, xyxy in pixels
    labels: np.ndarray  # (G,) int64
    files: tuple[str, ...]  # whose pixels it shows

    def resized(self, size: tuple[int, int]) -> Picture:
        """The picture in another `size` (h, w), without a copy if it has that size."""
        height, width = self.image.shape[:2]
        if size == (height, width):
            return self
        factors = np.tile([size[1] / width, size[0] / height], 2)
        return self._replace(image=resize_image(self.image, size), boxes=self.boxes * factors)


class Mosaic:
    """Joins four pictures, two by two on a canvas, which is then rotated, scaled and shifted about its centre.

    Each picture is resized, and lies in the top left corner of its cell. All cells are as large as the largest picture
    needs; what no picture covers is black. The result has the size of the canvas. A box becomes the enclosing box of
    its four rotated corners, clipped; objects that leave the canvas are dropped.

    Differs from DEIM's class in four things: pixels are interpolated bilinearly, not taken from the nearest one; the
    long side of a picture has a bound, so that the memory has one; no cache of images is kept; the augmentations that
    follow are those of any image, also a random crop, which DEIM omits after a mosaic.

    Args:
        probability: that an image becomes a mosaic.
        side, max_size: short side of each picture, and bound of its long side, in pixels; see `resized_size`.
        rotation: largest angle in degrees, in both directions.
        translation: largest shift along each axis, as a share of the canvas.
        scale: smallest and largest factor.

    Raises:
        UserError: `probability` is outside [0, 1], or `scale` does not hold two rising positive numbers.
    """

    def __init__(
        self,
        *,
        probability: float = 0.5,
        side: int = 320,
        max_size: int = 640,
        rotation: float = 10.0,
        translation: float = 0.1,
        scale: Sequence[float] = (0.5, 1.5),
    ):
        self.probability = _probability("mosaic", probability)
        self.side = side
        self.max_size = max_size
        self.rotation = rotation
        self.translation = translation
        self.scale = tuple(scale)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale of the mosaic must be two positive numbers, the smaller one first: {self.scale}")

    def __call__(self, pictures: Iterable[Picture], numbers: np.random.Generator) -> Picture:
        """Four pictures, from the top left to the bottom right -> the mosaic.

        `pictures` may be an iterator that reads files: each is resized before the next one is asked for.
        """
        joined = self.join(pictures)
        angle = np.radians(numbers.uniform(-self.rotation, self.rotation))
        factor = numbers.uniform(*self.scale)
        size = np.array(joined.image.shape[1::-1])  # (2,) x, y
        shift = numbers.uniform(-self.translation, self.translation, 2) * size
        linear = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return _moved(joined, linear, size / 2 + shift - linear @ (size / 2))

    def join(self, pictures: Iterable[Picture]) -> Picture:
        """Four pictures, from the top left to the bottom right -> the canvas, not yet rotated, scaled or shifted."""
        parts = [p.resized(self._cell_size(*p.image.shape[:2])) for p in pictures]
        cell = np.max([p.image.shape[:2] for p in parts], axis=0)  # (2,) y, x
        canvas = np.zeros((*2 * cell, 3), np.uint8)
        boxes = []
        for number, part in enumerate(parts):
            y, x = cell * divmod(number, 2)
            height, width = part.image.shape[:2]
            canvas[y : y + height, x : x + width] = part.image
            boxes.append(part.boxes.clip(0, [width, height, width, height]) + [x, y, x, y])
        labels = np.concatenate([p.labels for p in parts])
        return Picture(canvas, np.concatenate(boxes), labels, sum((p.files for p in parts), ()))

    def _cell_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture in its cell; a strip of a few pixels is not longer than `max_size` either."""
        height, width = resized_size(height, width, self.side, self.max_size)
        return min(height, self.max_size), min(width, self.max_size)


class MixUp:
    """Blends two pictures, and keeps the objects of both.

    The second one is resized to fit inside the first, with its own ratio of sides, and lies in the top left corner.
    Beside it, the first stays as it is. So the result has the size of the first, and a batch needs no more memory.

    Differs from DEIM's, which blends each image of a batch with its neighbour after all augmentations: its images have
    one size, for which it changes the ratio of their sides. These have any size, and those of a batch are padded later.
    So the blend comes before the augmentations, which both pictures go through together. It is drawn for each image,
    not for a batch, and the second picture is any of the data set.

    Args:
        probability: that an image is blended with another.
        ratio: smallest and largest share of the first picture; the second has the rest.

    Raises:
        UserError: `probability` is outside [0, 1], or `ratio` does not hold two rising numbers in [0, 1].
    """

    def __init__(self, *, probability: float = 0.5, ratio: Sequence[float] = (0.45, 0.55)):
        self.probability = _probability("mixup", probability)
        self.ratio = tuple(ratio)
        if len(self.ratio) != 2 or not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise UserError(f"ratio of mixup must be two numbers in [0, 1], the smaller one first: {self.ratio}")

    def __call__(self, first: Picture, second: Picture, numbers: np.random.Generator) -> Picture:
        """Two pictures of any sizes -> their blend, in the size of the first."""
        share = numbers.uniform(*self.ratio)
        size, other = np.array(first.image.shape[:2]), np.array(second.image.shape[:2])
        height, width = (int(n) for n in np.clip(np.round(other * (size / other).min()), 1, size))
        second = second.resized((height, width))
        image = first.image.copy()
        pair = (Image.fromarray(part) for part in (second.image, image[:height, :width]))
        image[:height, :width] = Image.blend(*pair, share)
        boxes, labels = (np.concatenate(both) for both in zip(first[1:3], second[1:3], strict=True))
        return Picture(image, boxes, labels, first.files + second.files)


class _Place(Protocol):
    """The place of an image in the training, see `dino.training.image_order.Place`."""

    iteration: int
    numbers: np.random.Generator

    def others(self, count: int) -> list[Any]: ...


class Combination:
    """A mosaic and a mixture of images, in a part of the training.

    Both are off at the start and at the end of the training. A mixture may have a mosaic in both of its parts, so it
    shows up to eight images.

    Args:
        mosaic: joins four images.
        mixup: blends two.
        begin, end: the part of the training, in shares of its iterations; from `begin` to before `end`.
        max_iter: length of the training in iterations; None until it is known.

    Raises:
        UserError: `begin` and `end` are not two rising numbers in [0, 1]; or, when called, `max_iter` is None.
    """

    def __init__(self, *, mosaic: Mosaic, mixup: MixUp, begin: float, end: float, max_iter: int | None):
        if not 0 <= begin <= end <= 1:
            raise UserError(f"begin={begin} and end={end} of mosaic and mixup must rise within [0, 1]")
        self.mosaic = mosaic
        self.mixup = mixup
        self.begin = begin
        self.end = end
        self.max_iter = max_iter

    @property
    def first_iteration(self) -> int:
        """The first iteration that may show combined images."""
        return self._iteration(self.begin)

    def __call__(self, entry: Any, place: _Place, read: Callable[[Any], Picture]) -> Picture:
        """The picture that is shown for an entry of the data set, which `read` reads."""
        if not self.first_iteration <= place.iteration < self._iteration(self.end):
            return read(entry)
        picture = self._scene(entry, place, read)
        if place.numbers.random() < self.mixup.probability:
            picture = self.mixup(picture, self._scene(*place.others(1), place, read), place.numbers)
        return picture

    def _iteration(self, share: float) -> int:
        """The iteration at a share of the training."""
        if self.max_iter is None:
            raise UserError("mosaic and mixup need the length of the training: set train.max_iter")
        return round(share * self.max_iter)

    def _scene(self, entry: Any, place: _Place, read: Callable[[Any], Picture]) -> Picture:
        """The image of an entry, alone or in a mosaic."""
        if place.numbers.random() >= self.mosaic.probability:
            return read(entry)
        return self.mosaic(map(read, [entry, *place.others(3)]), place.numbers)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"probability of {name} must be in [0, 1], not {value}")
    return value


def _moved(picture: Picture, linear: np.ndarray, offset: np.ndarray) -> Picture:
    """A picture whose every point (x, y) goes to `linear` (2, 2) @ point + `offset` (2,), on a canvas of its size."""
    height, width = picture.image.shape[:2]
    inverse = np.linalg.inv(linear)  # Pillow asks where a pixel of the result comes from
    rows = np.column_stack([inverse, -inverse @ offset])  # (2, 3)
    image = Image.fromarray(picture.image).transform(
        (width, height), Image.Transform.AFFINE, rows.ravel().tolist(), Image.Resampling.BILINEAR
    )
    corners = picture.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ linear.T + offset  # (G, 4, 2)
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)  # (G, 4)
    boxes = boxes.clip(0, [width, height, width, height])
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Picture(np.array(image), boxes[kept], picture.labels[kept], picture.files)
