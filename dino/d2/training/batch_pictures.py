"""Pictures of training batches and of predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from dino.d2.meta_arch import DINODetector
from dino.inference.palette import Colour
from dino.structures import SCORE_THRESH, Detections
from dino.training.denoising_boxes import denoising_boxes
from dino.training.run_pictures import MOST_IMAGES, draw_train_batch, draw_val_predictions
from dino.training.shards import unwrapped

from .parallel import drop_shards, gather_shards

__all__ = ["MOST_IMAGES", "BatchPictures", "draw_predictions"]


class BatchPictures(HookBase):
    """Draws augmented batches: objects and, beside them, one group of a `DINODetector`'s denoising queries.

    Args:
        paths: of the PNG for each iteration whose batch is drawn.
        names: class names.
    """

    def __init__(self, paths: dict[int, str], names: list[str]):
        self.paths = paths
        self.names = names

    def after_step(self) -> None:
        """Draw the batch of this iteration, if it is one of those."""
        path = self.paths.get(self.trainer.iter)
        if path is None:
            return
        model = unwrapped(self.trainer.model)
        gather_shards(model)
        if comm.is_main_process():
            batch = self.trainer.batch[:MOST_IMAGES]
            if hasattr(model, "network"):
                _draw_batch(model, batch, self.names, path)
            else:
                _draw_objects(batch, self.names, path)
        drop_shards(model)


def _draw_batch(model: DINODetector, batch: list[dict], names: list[str], path: str) -> None:
    """Draw a training batch and denoising queries of its objects, see `BatchPictures`."""
    sizes = [x["image"].shape[1:] for x in batch]
    _draw_objects(batch, names, path, denoising_boxes(model.network, [model.to_target(x) for x in batch], sizes))


def _draw_objects(batch: list[dict], names: list[str], path: str, queries: Sequence[dict[Colour, Tensor]] = ()) -> None:
    """Draw a training batch; `queries`: as of `draw_train_batch`."""
    objects = [x["instances"] for x in batch]
    boxes, labels = [o.gt_boxes.tensor.cpu() for o in objects], [o.gt_classes for o in objects]
    draw_train_batch(path, [x["image"] for x in batch], boxes, labels, names, queries)


@torch.no_grad()
def draw_predictions(
    model: DINODetector, batch: list[dict], names: list[str], path: str, threshold: float = SCORE_THRESH
) -> None:
    """Draw detections of at least the score `threshold` beside the true boxes.

    Args:
        model, names, path: the detector, class names, and the PNG to write.
        batch: dicts of a data set with the mapped `image` in each.
    """
    found, boxes, labels = [], [], []
    for x in batch:
        height, width = x["image"].shape[1:]
        scale = torch.tensor([width / x["width"], height / x["height"]] * 2)
        annotations = x.get("annotations", [])
        boxes.append(torch.tensor([o["bbox"] for o in annotations]).reshape(-1, 4) * scale)
        labels.append(torch.tensor([o["category_id"] for o in annotations], dtype=torch.int64))
        own = model([{**x, "height": height, "width": width}])[0]["instances"].to("cpu")
        found.append(Detections(own.pred_boxes.tensor, own.scores, own.pred_classes))
    if comm.is_main_process():
        draw_val_predictions(path, [x["image"] for x in batch], found, boxes, labels, names, threshold)
