"""Evaluation with test-time augmentation (TTA)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from dino.inference.tta import join, make_view, views
from dino.layers import Detections

from .meta_arch import DINODetector

logger = logging.getLogger("detectron2.dino")


class AugmentedDetector(DINODetector):
    """A `DINODetector` that detects in several views of each image: resized and mirrored.

        --eval-only model._target_=dino.d2.augmented_detector.AugmentedDetector dataloader.test.mapper.augmentations=[]

    Views are made from the given image: switch off the resizing of the test data, as above. Detections of the views are
    joined one to one, as in appendix A of the paper, see `dino.inference.tta.join`: the result has the detections of
    the main view, and their boxes are averages over the views. The main view is the first of `sizes`, not mirrored: put
    the size of the plain evaluation there. Training is that of `DINODetector`. State the augmentation beside an AP
    reached with it: the paper's figures for the ResNet-50 and most others are without.

    Detectron2's `GeneralizedRCNNWithTTA` refuses every model but R-CNNs: `AugmentedDetector.from_model(cfg, model)`
    takes the same arguments.

    Args:
        sizes: lengths of the short side of the views in pixels, that of the main view first.
        max_size: bound of their long side in pixels.
        flips: (False,) for plain views, (False, True) for mirrored ones as well.
        overlap: IoU in [0, 1] above which a box of another view is averaged with one of the main view.
        weights: of the views, positive: for each size the plain view, then the mirrored one; None for equal weights.
        arguments: of `DINODetector`.

    Raises:
        ValueError: there is no size, `overlap` is not in [0, 1], the number of weights is not that of the views, or one
            is not positive.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (800, 640, 960),
        max_size: int = 1600,
        flips: Sequence[bool] = (False, True),
        overlap: float = 0.7,
        weights: Sequence[float] | None = None,
        **arguments,
    ):
        super().__init__(**arguments)
        if not sizes or not 0 <= overlap <= 1:
            raise ValueError(f"views need a size, and `overlap` lies in [0, 1]: sizes={list(sizes)}, overlap={overlap}")
        self.sizes = list(sizes)
        self.max_size = max_size
        self.flips = list(flips)
        self.overlap = overlap
        count = len(views(1, 1, self.sizes, self.max_size, self.flips))  # the same for an image of any size
        self.weights = [1.0] * count if weights is None else list(weights)
        if len(self.weights) != count or not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights must be {count} positive numbers, one for each view, not {self.weights}")
        logger.warning(
            f"test-time augmentation: {self.sizes} pixels, flips {self.flips}, main view {self.sizes[0]} pixels; "
            "name it beside any AP"
        )

    @classmethod
    def from_model(cls, cfg: CfgNode, model: DINODetector) -> AugmentedDetector:
        """What `GeneralizedRCNNWithTTA(cfg, model)` is to Detectron2's R-CNNs, which takes no other models.

        Args:
            cfg: of Detectron2's yacs system; `TEST.AUG` states the views, `INPUT.MIN_SIZE_TEST` the main one.
            model: whose network is used, not copied.
        """
        aug, main, images = cfg.TEST.AUG, cfg.INPUT.MIN_SIZE_TEST, model.preprocessing._asdict()
        del images["short_side"], images["max_size"]
        made = cls(
            sizes=[main, *(size for size in aug.MIN_SIZES if size != main)],
            max_size=aug.MAX_SIZE,
            flips=(False, True) if aug.FLIP else (False,),
            network=model.network,
            criterion=model.criterion,
            num_classes=model.num_classes,
            score_thresh=model.score_thresh,
            **images,
        )
        return made.to(model.device).eval()

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
            results.append(join(found, chosen, self.weights, size[1], self.overlap))
        return results
