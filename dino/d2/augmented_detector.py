"""Test-time augmentation: every image is seen at several sizes and mirrored, and the detections are joined."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torchvision.ops import batched_nms

from .meta_arch import DINODetector

logger = logging.getLogger("detectron2.dino")


class AugmentedDetector(DINODetector):
    """A `DINODetector` that detects in several views of each image; it trains as any other.

        --eval-only model._target_=dino.d2.augmented_detector.AugmentedDetector dataloader.test.mapper.augmentations=[]

    Views are made from the image that it is given: leave out the resizing of the test data, as above. Of detections of
    one class that overlap by more than `overlap`, from whichever views, the best one stays. An AP that was reached in
    this way is to be named so: the paper's figures for the ResNet-50 and most others are without.

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
        self.views = DatasetMapperTTA(list(sizes), max_size, True in list(flips))
        self.overlap = overlap
        logger.warning(f"test-time augmentation: {list(sizes)} pixels, flips {list(flips)}; name it beside any AP")

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """One image after another, view by view, for views differ in size."""
        return [{"instances": self.detect_in_views(x)} for x in batched_inputs]

    def detect_in_views(self, x: dict) -> Instances:
        """The joined detections of one image, in pixels of the picture that the image was made from."""
        height, width = x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])
        views = self.views({**x, "image": x["image"].cpu(), "height": height, "width": width})
        found = [self.detect_in_view(view, (height, width)) for view in views]
        joined = Instances.cat(found)
        kept = batched_nms(joined.pred_boxes.tensor, joined.scores, joined.pred_classes, self.overlap)
        return joined[kept[: self.max_detections]]

    def detect_in_view(self, view: dict, size: tuple[int, int]) -> Instances:
        """The detections of one view, brought back to the picture of `size` (height, width)."""
        height, width = view["image"].shape[1:]
        (result,) = super().detect([{**view, "height": height, "width": width}])
        instances = result["instances"]
        boxes = view["transforms"].inverse().apply_box(instances.pred_boxes.tensor.cpu().numpy())
        boxes = torch.as_tensor(boxes, dtype=torch.float32, device=instances.scores.device)
        return Instances(size, pred_boxes=Boxes(boxes), scores=instances.scores, pred_classes=instances.pred_classes)
