"""From `Detections` to Detectron2's `Instances`: clipped to the picture, as its detectors return them, or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from dino.inference.tiling import clip, nonempty
from dino.structures import Detections
from dino.utils.device import to_device


class UnclippedInstances:
    """Boxes as the network predicts them, as the official program computes AP; they can cross the picture's borders."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(self, found: Sequence[Detections], sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """Detections of each picture, and its height and width in pixels -> `Instances` with as many objects."""
        if torch.jit.is_tracing():  # which keeps sizes open that are tensors
            sizes = [to_device(size, torch.device("cpu")) for size in sizes]
        return [
            Instances(size, pred_boxes=Boxes(d.boxes), scores=d.scores, pred_classes=d.labels)
            for d, size in zip(found, sizes, strict=True)
        ]


class ClippedInstances(UnclippedInstances):
    """Boxes clipped to the picture, without those that are empty then: as of Detectron2's `detector_postprocess`.

    The centre of a predicted box lies in the picture: only a box whose width or height is 0 in float32 can be empty.
    """

    def __call__(self, found: Sequence[Detections], sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """As of `UnclippedInstances`, clipped; the device is read once for the whole batch."""
        found = [clip(d, size) for d, size in zip(found, sizes, strict=True)]
        masks = [nonempty(d) for d in found]  # (K,) each
        kept = zip(super().__call__(found, sizes), masks, _complete(masks), strict=True)
        return [instances if complete else instances[mask] for instances, mask, complete in kept]


def _complete(masks: Sequence[Tensor]) -> Sequence[bool]:
    """For each mask, whether it is True everywhere; a traced graph may not depend on it, and selects always."""
    if torch.jit.is_tracing() or not masks:
        return [False] * len(masks)
    return torch.stack([mask.all() for mask in masks]).tolist()
