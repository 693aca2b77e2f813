"""Variants of `ContrastiveDenoising`."""

from __future__ import annotations

from torch import Tensor

from dino.layers.denoising import ContrastiveDenoising, Noise


class PositiveDenoising(ContrastiveDenoising):
    """Denoising without negatives (DN-DETR, arXiv 2203.01305): a group holds one positive for each object.

    Groups, mask, budget and noise are those of `ContrastiveDenoising`: only the negatives differ. (DN-DETR itself has 5
    groups, and shifts and scales boxes instead of moving their corners.)
    """

    KINDS = 1


class ShiftDenoising(ContrastiveDenoising):
    """Contrastive denoising whose negatives are shifted boxes of the object's own size.

    The centre (cx, cy) moves to (cx + sx (1 + ux) box_noise w/2, cy + sy (1 + uy) box_noise h/2), with signs sx, sy
    and ux, uy uniform in [0, 1): along each axis by one to two half sides, at a `box_noise` of 1. So a negative covers
    at most a quarter of the object, its IoU is at most 1/7, and no side is below 0. Corners are then clamped to the
    image. Positives are those of `ContrastiveDenoising`.
    """

    def steps(self, noise: Noise) -> Tensor:
        """(R, K, 4): shift of each number of (x0, y0, x1, y1) in half sides, equal for both corners of a negative."""
        steps = super().steps(noise)
        steps[1::2, :, 2:] = steps[1::2, :, :2]
        return steps
