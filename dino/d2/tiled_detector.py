"""Evaluation of large pictures in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from dino.inference.predictor import Predictor
from dino.inference.tiling import scale
from dino.layers import Detections
from dino.modeling.detector import Detector

from .meta_arch import DINODetector


class TiledDetector(DINODetector):
    """A `DINODetector` that detects in tiles of large pictures and in the whole picture, as `dino predict --tile` does.

        --eval-only model._target_=dino.d2.tiled_detector.TiledDetector dataloader.test.mapper.augmentations=[]

    Tiles are cut from the given image and resized one by one: switch off the resizing of the test data, as above.
    Training is that of `DINODetector`. State the tiles beside an AP reached with them.

    Args:
        tile: side of the tiles in pixels; smaller pictures are not cut.
        overlap: of neighbouring tiles, as a fraction in [0, 1).
        short_side, max_size: to which a tile, or the whole picture, is resized, in pixels.
        arguments: of `DINODetector`.
    """

    def __init__(
        self, *, tile: int = 1024, overlap: float = 0.2, short_side: int = 800, max_size: int = 1333, **arguments
    ):
        super().__init__(**arguments)
        self.preprocessing = self.preprocessing._replace(short_side=short_side, max_size=max_size)
        plain = Detector(self.network, self.preprocessing)
        self.predictor = Predictor(plain.eval(), score_thresh=0, tile=tile, overlap=overlap, cuda_graphs=0)

    def replay(self, most: int) -> AbstractContextManager[None]:
        """As `Detector.replay`; the predictor's detector runs the network."""
        return self.predictor.detector.replay(most)

    def detect(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        sources: Sequence[str] = (),
        **options: Any,
    ) -> list[Detections]:
        """As `Detector.detect`, but for images that were not resized; results are on the CPU."""
        pictures = [image.permute(1, 2, 0).byte().cpu().numpy() for image in images]
        found = self.predictor.detect(pictures, sources, **options)
        sizes = [picture.shape[:2] for picture in pictures] if sizes is None else sizes
        return [scale(f, p.shape[:2], size) for f, p, size in zip(found, pictures, sizes, strict=True)]
