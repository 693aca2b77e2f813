"""Large pictures in tiles, for evaluation and training's evaluations."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

from dino.inference.predictor import Predictor
from dino.layers import Detections
from dino.weights.description import Preprocessing

from .meta_arch import DINODetector


class TiledDetector(DINODetector):
    """A `DINODetector` that looks at large pictures in tiles, next to the whole, as `dino predict --tile` does.

        --eval-only model._target_=dino.d2.tiled_detector.TiledDetector dataloader.test.mapper.augmentations=[]

    Tiles are cut from the image that it is given and resized one by one: leave out the resizing of the test data, as
    above. It trains as any other. An AP that was reached in this way is to be named so.

    Args:
        tile: side of the tiles in pixels; smaller pictures are looked at whole.
        overlap: of neighbouring tiles, as a fraction in [0, 1).
        short_side, max_size: to which a tile, or the whole picture, is resized, in pixels.
        arguments: of `DINODetector`.
    """

    def __init__(
        self, *, tile: int = 1024, overlap: float = 0.2, short_side: int = 800, max_size: int = 1333, **arguments
    ):
        super().__init__(**arguments)
        statistics = (self.pixel_mean.flatten().tolist(), self.pixel_std.flatten().tolist())
        preprocessing = Preprocessing(*statistics, short_side, max_size, self.max_detections)
        names = [str(label) for label in range(self.num_classes)]
        self.look = Predictor(self.network, names, preprocessing, score_thresh=0, tile=tile, overlap=overlap)

    def detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detections of each picture, in pixels of the one that it was made from."""
        pictures = [x["image"].permute(1, 2, 0).byte().cpu().numpy() for x in batched_inputs]
        found = self.look.detect(pictures)
        return [{"instances": self.instances(x, f)} for x, f in zip(batched_inputs, found, strict=True)]

    def instances(self, x: dict, found: Detections) -> Instances:
        """Detections in pixels of the image that was given -> of the picture."""
        height, width = x["image"].shape[1:]
        size = (x.get("height", height), x.get("width", width))
        boxes = Boxes(torch.as_tensor(found.boxes))
        boxes.scale(size[1] / width, size[0] / height)
        return Instances(size, pred_boxes=boxes, scores=found.scores, pred_classes=found.labels)
