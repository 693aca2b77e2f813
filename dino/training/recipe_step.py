"""A `TrainingStep` on batches of this package's own form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino.layers.boxes import cxcywh_to_xyxy
from dino.structures import Target

from .training_step import TrainingStep

Sample = tuple[Tensor, Target, dict]  # image (3, h, w) uint8 RGB; its objects; `file_name` and perhaps `image_id`


class RecipeStep(TrainingStep):
    """A `TrainingStep` of a `Detector` on lists of `Sample`."""

    def compute_losses(self, part: list[Sample], options: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch."""
        images, targets, infos = zip(*part, strict=True)
        return self.model.losses(images, targets, sources=[str(x["file_name"]) for x in infos], **options)

    def count_objects(self, sample: Sample) -> int:
        """Number of its objects."""
        return len(sample[1].labels)

    def describe(self, sample: Sample) -> dict:
        """Its file, image and objects as plain data."""
        image, target, info = sample
        return {
            "file_name": str(info["file_name"]),
            "image_id": info.get("image_id"),
            "image": image,
            "boxes": boxes_in_pixels(sample),
            "labels": target.labels,
        }


def boxes_in_pixels(sample: Sample) -> Tensor:
    """(G, 4), xyxy in pixels of the image."""
    image, target, _ = sample
    height, width = image.shape[1:]
    return cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
