"""The exported module, the description in its file, and the inputs that it expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dino
from dino.data.images import resize_image
from dino.modeling.detector import Detector, Preprocessing, resized_size


class Fixed(NamedTuple):
    """The only size that an exported program takes."""

    batch: int
    height: int  # pixels
    width: int


class ExportWrapper(nn.Module):
    """A `Detector` with tensors for inputs and outputs, as `torch.export` and TorchScript need.

    Args:
        detector: in evaluation mode.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (B, 3, H, W) uint8, RGB, each in the upper left corner; values outside do not matter.
            sizes: (B, 2) int64, height and width of each image in pixels.

        Returns:
            boxes (B, K, 4) float32, xyxy in pixels of `images`; scores (B, K) float32, best first; labels (B, K) int64.
        """
        outputs = self.detector.network(*self.detector.pad(images, sizes))
        return tuple(self.detector.postprocess(outputs, sizes))


def describe(
    names: Sequence[str],
    thresholds: Sequence[float],
    preprocessing: Preprocessing,
    fixed: Fixed | None,
    category_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Describe an exported program for its file, as a dict of plain values; `docs/export.md` explains the keys."""
    resize: dict[str, Any] = {"short_side": preprocessing.short_side, "max_size": preprocessing.max_size}
    if fixed:
        resize = {"fit": [fixed.height, fixed.width]}
    return {
        "names": list(names),
        "category_ids": list(category_ids) or list(range(1, len(names) + 1)),
        "thresholds": list(thresholds),
        "resize": resize,
        "input_range": list(preprocessing.input_range) if preprocessing.input_range else None,
        "images": "uint8 (batch, 3, height, width), RGB, each resized and in the upper left corner",
        "sizes": "int64 (batch, 2), height and width of each image after resizing",
        "boxes": "x0, y0, x1, y1 in pixels of the resized image",
        "made_by": f"dino-detectron2 {dino.__version__}, torch {torch.__version__}",
    }


class Prepared(NamedTuple):
    """One image in the form of an exported program's inputs."""

    images: np.ndarray  # (1, 3, H, W) uint8
    sizes: np.ndarray  # (1, 2) int64, height and width inside `images`


def prepare(image: np.ndarray, resize: dict[str, Any]) -> Prepared:
    """Resize an image (H, W, 3) uint8 RGB by the rule `resize` of `describe`."""
    height, width = image.shape[:2]
    if "fit" in resize:
        canvas = resize["fit"]
        scale = min(canvas[0] / height, canvas[1] / width)
        h, w = (max(1, int(side * scale + 0.5)) for side in (height, width))
    else:
        canvas = h, w = resized_size(height, width, resize["short_side"], resize["max_size"])
    images = np.zeros((1, 3, *canvas), np.uint8)
    images[0, :, :h, :w] = resize_image(image, (h, w)).transpose(2, 0, 1)
    return Prepared(images, np.array([[h, w]], np.int64))
