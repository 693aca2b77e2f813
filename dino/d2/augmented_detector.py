"""Evaluation with test-time augmentation (TTA)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dino.inference.tta import join, make_view, views
from dino.layers import Detections

from .meta_arch import DINODetector

logger = logging.getLogger("detectron2.dino")


class AugmentedDetector(DINODetector):
    """A `DINODetector` that detects in several views of each image: resized and mirrored.

        --eval-only model._target_=dino.d2.augmented_detector.AugmentedDetector dataloader.test.mapper.augmentations=[]

    Views are made from the given image: switch off the resizing of the test data, as above. Of detections of one class
    that overlap by more than `overlap`, the best one stays. Training is that of `DINODetector`. State the augmentation
    beside an AP reached with it: the paper's figures for the ResNet-50 and most others are without.

    Args:
        sizes: lengths of the short side of the views in pixels.
        max_size: bound of their long side in pixels.
        flips: (False,) for plain views, (False, True) for mirrored ones as well.
        overlap: IoU in [0, 1].
        arguments: of `DINODetector`.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (640, 800, 960),
        max_size: int = 1600,
        flips: Sequence[bool] = (False, True),
        overlap: float = 0.7,
        **arguments,
    ):
        super().__init__(**arguments)
        self.sizes = list(sizes)
        self.max_size = max_size
        self.flips = list(flips)
        self.overlap = overlap
        logger.warning(f"test-time augmentation: {self.sizes} pixels, flips {self.flips}; name it beside any AP")

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        sources: Sequence[str] = (),
        **options: Any,
    ) -> list[Detections]:
        """As `Detector.detect`, but for images that were not resized; one view after another."""
        sizes = [tuple(image.shape[1:]) for image in images] if sizes is None else sizes
        results = []
        for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
            chosen = views(*image.shape[1:], self.sizes, self.max_size, self.flips)
            seen = [make_view(image, view) for view in chosen]
            called = [sources[i]] * len(seen) if sources else ()
            found = super().detect(seen, [size] * len(seen), sources=called, **{"batch_size": 1, **options})
            results.append(join(found, chosen, size[1], self.overlap, self.preprocessing.max_detections))
        return results
