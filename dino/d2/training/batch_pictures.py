"""Pictures of training batches and of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch import Tensor

from dino.d2.meta_arch import DINODetector
from dino.inference.drawing import Colour, draw_boxes, tile_images
from dino.layers.boxes import cxcywh_to_xyxy
from dino.training.shards import unwrapped
from dino.utils.files import write_whole

from .parallel import drop_shards, gather_shards

_TRUTH, _POSITIVE, _NEGATIVE, _FOUND = (0, 255, 0), (0, 191, 255), (255, 0, 0), (255, 255, 0)
MOST_IMAGES = 8


class BatchPictures(HookBase):
    """Draws augmented batches: objects green, and one group of a `DINODetector`'s denoising queries.

    Positive queries are blue, negative ones red.

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


@torch.no_grad()
def _draw_batch(model: DINODetector, batch: list[dict], names: list[str], path: str) -> None:
    """Draw a training batch and denoising queries of its objects, see `BatchPictures`."""
    targets = [model.to_target(x) for x in batch]
    denoising = model.network.denoising(targets, model.network.query_selection.num_queries)
    boxes = cxcywh_to_xyxy(denoising.queries.box_logits.sigmoid()).cpu()  # (B, T, 4)
    kinds = (_POSITIVE, _NEGATIVE)[: model.network.denoising.KINDS]
    part = boxes.shape[1] // max(1, len(kinds) * denoising.num_groups)  # slots of a kind in a group
    drawn = []
    for x, slots, denoised in zip(batch, boxes, denoising.targets, strict=True):
        height, width = x["image"].shape[1:]
        count = len(denoised.labels) if denoising.num_groups else 0  # fewer than the objects of a crowded image
        corners = slots * torch.tensor([width, height, width, height])  # (T, 4), xyxy in pixels
        picture = _to_picture(x["image"])
        for kind, colour in reversed(list(enumerate(kinds))):  # positives lie above negatives
            picture = _draw(picture, corners[kind * part : kind * part + count], colour)
        drawn.append(_draw_truth(picture, x, names))
    _save_grid(drawn, path)


def _draw_objects(batch: list[dict], names: list[str], path: str) -> None:
    """Draw a training batch of a detector that has no denoising queries."""
    _save_grid([_draw_truth(_to_picture(x["image"]), x, names) for x in batch], path)


@torch.no_grad()
def draw_predictions(model: DINODetector, batch: list[dict], names: list[str], path: str, threshold: float) -> None:
    """Draw detections of at least the score `threshold` in yellow, above the truth in green.

    Args:
        model, names, path: the detector, class names, and the PNG to write.
        batch: dicts of a data set with the mapped `image` in each.
    """
    drawn = []
    for x in batch:
        height, width = x["image"].shape[1:]
        scale = torch.tensor([width / x["width"], height / x["height"]] * 2)
        truth = torch.tensor([o["bbox"] for o in x.get("annotations", [])]).reshape(-1, 4) * scale
        found = model([{**x, "height": height, "width": width}])[0]["instances"]
        found = found[found.scores >= threshold].to("cpu")
        pairs = zip(found.pred_classes.tolist(), found.scores.tolist(), strict=True)
        texts = [f"{names[label]} {score:.2f}" for label, score in pairs]
        picture = _draw(_to_picture(x["image"]), truth, _TRUTH)
        drawn.append(_draw(picture, found.pred_boxes.tensor, _FOUND, texts))
    if comm.is_main_process():
        _save_grid(drawn, path)


def _to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 RGB -> Pillow's image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _draw_truth(picture: Image.Image, x: dict, names: list[str]) -> Image.Image:
    """A picture with the objects of its dict, and their names."""
    instances = x["instances"]
    texts = [names[label] for label in instances.gt_classes.tolist()]
    return _draw(picture, instances.gt_boxes.tensor, _TRUTH, texts)


def _draw(picture: Image.Image, boxes: Tensor, colour: Colour, texts: Sequence[str] = ()) -> Image.Image:
    """A picture with boxes (N, 4), xyxy in pixels, in one colour."""
    return draw_boxes(picture, boxes.tolist(), [colour] * len(boxes), texts, width=1)


def _save_grid(pictures: list[Image.Image], path: str) -> None:
    """Write pictures of any sizes side by side as a PNG."""
    grid = tile_images(pictures, columns=int(np.ceil(len(pictures) ** 0.5)))
    write_whole(Path(path), lambda part: grid.save(part, format="png"))
