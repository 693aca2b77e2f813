"""A `Predictor` with the contract of Detectron2's `DefaultPredictor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances

from dino.inference.detections import Detections
from dino.inference.predictor import Predictor

from .instances import ClippedInstances


class InstancesPredictor:
    """Pictures as OpenCV reads them in, Detectron2's `Instances` out: for programs made for `DefaultPredictor`.

        predict = InstancesPredictor.from_checkpoint("model_final.pth")
        instances = predict(cv2.imread("photo.jpg"))["instances"]
        Visualizer(image[:, :, ::-1], predict.metadata).draw_instance_predictions(instances)

    Attributes:
        model: the network.
        metadata: `thing_classes`, for Detectron2's `Visualizer`.
        input_format: "BGR", the order of the channels.
    """

    input_format = "BGR"

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.model = predictor.network
        self.metadata = Metadata(name="dino", thing_classes=predictor.names)

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, score_thresh: float = 0.0, **options: Any) -> InstancesPredictor:
        """Build one from a checkpoint alone; arguments of `Predictor.from_checkpoint`. Every score is returned."""
        return cls(Predictor.from_checkpoint(path, score_thresh=score_thresh, **options))

    def __call__(self, original_image: np.ndarray) -> dict[str, Instances]:
        """Detect in one picture (H, W, 3), uint8, BGR.

        Returns:
            {"instances": Instances} on the CPU with `pred_boxes` (xyxy in pixels of the picture, clipped to it),
            `scores` and `pred_classes`, best first.

        Raises:
            DataError: the array is no picture.
            FloatingPointError: predictions are NaN or infinite.
        """
        return {"instances": to_instances(self.predictor(original_image, channels=self.input_format))}


def to_instances(found: Detections) -> Instances:
    """The objects of a picture as Detectron2's `Instances`, see `Detections.to_instances`."""
    return ClippedInstances()([found.detections], [found.image_size])[0]
