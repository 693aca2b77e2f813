"""What is exported: from pixels to boxes in pixels; and what its file says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dino
from dino.data.images import resized_size
from dino.layers import batch_detections
from dino.modeling import DINO
from dino.weights.description import Preprocessing


class Fixed(NamedTuple):
    """The only size that an exported program takes."""

    batch: int
    height: int  # pixels
    width: int


class Detector(nn.Module):
    """A network with its normalisation in front and the choice of detections behind it.

    Args:
        network: in evaluation mode.
        preprocessing: what it expects of images.
    """

    def __init__(self, network: DINO, preprocessing: Preprocessing):
        super().__init__()
        self.network = network
        self.max_detections = preprocessing.max_detections
        self.register_buffer("mean", torch.tensor(preprocessing.pixel_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.pixel_std).view(3, 1, 1))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (B, 3, H, W) uint8, RGB, each in the upper left corner; what lies outside does not matter.
            sizes: (B, 2) int64, height and width of each image in pixels.

        Returns:
            boxes (B, K, 4) float32, xyxy in pixels of `images`; scores (B, K) float32, best first; labels (B, K) int64.
        """
        pixels, padding = self.normalise(images, sizes)
        predictions = self.network(pixels, padding).decoder
        return tuple(batch_detections(predictions.logits[-1], predictions.boxes[-1], sizes, self.max_detections))

    def normalise(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """-> (B, 3, H, W) float32, zero where padded, and the padding (B, H, W)."""
        row = torch.arange(images.shape[2], device=images.device)[:, None]  # (H, 1)
        column = torch.arange(images.shape[3], device=images.device)  # (W,)
        padding = (row >= sizes[:, :1, None]) | (column >= sizes[:, 1:, None])
        return ((images.float() - self.mean) / self.std).masked_fill(padding[:, None], 0), padding


def describe(names: Sequence[str], thresholds: Sequence[float], preprocessing: Preprocessing, fixed: Fixed | None):
    """What travels with an exported program, as a dict of plain values; `docs/export.md` explains the keys."""
    resize: dict[str, Any] = {"short_side": preprocessing.short_side, "max_size": preprocessing.max_size}
    if fixed:
        resize = {"fit": [fixed.height, fixed.width]}
    return {
        "names": list(names),
        "thresholds": list(thresholds),
        "resize": resize,
        "images": "uint8 (batch, 3, height, width), RGB, each resized and in the upper left corner",
        "sizes": "int64 (batch, 2), height and width of each image after resizing",
        "boxes": "x0, y0, x1, y1 in pixels of the resized image",
        "made_by": f"dino-detectron2 {dino.__version__}, torch {torch.__version__}",
    }


class Prepared(NamedTuple):
    """One image as an exported program wants it."""

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
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    images = np.zeros((1, 3, *canvas), np.uint8)
    images[0, :, :h, :w] = resized.transpose(2, 0, 1)
    return Prepared(images, np.array([[h, w]], np.int64))
