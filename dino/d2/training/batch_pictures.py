"""Pictures of what goes into the detector and of what comes out, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch import Tensor, nn

from dino.d2.meta_arch import DINODetector
from dino.inference.drawing import Colour, draw_boxes, tile_images
from dino.layers.boxes import cxcywh_to_xyxy
from dino.utils.files import write_whole

from .parallel import drop_shards, gather_shards, unwrapped

TRUTH, POSITIVE, NEGATIVE, FOUND = (0, 255, 0), (0, 191, 255), (255, 0, 0), (255, 255, 0)
MOST_IMAGES = 8


class FirstBatch(HookBase):
    """Draws the first augmented batch: objects green, and of a `DINODetector` one group of their denoising queries.

    Slightly noised ones (to be repaired) are blue, strongly noised ones (to be rejected) red.

    Args:
        path: of the PNG.
        names: class names.
    """

    def __init__(self, path: str, names: list[str]):
        self.path = path
        self.names = names

    def after_step(self) -> None:
        """Draw, in the first iteration of a run."""
        if self.trainer.iter:
            return
        model = unwrapped(self.trainer.model)
        gather_shards(model)
        if comm.is_main_process():
            draw = draw_batch if hasattr(model, "network") else draw_objects
            draw(model, self.trainer.batch[:MOST_IMAGES], self.names, self.path)
        drop_shards(model)


@torch.no_grad()
def draw_batch(model: DINODetector, batch: list[dict], names: list[str], path: str) -> None:
    """Draw a training batch and denoising queries as its objects would be given, see `FirstBatch`."""
    targets = [model.to_target(x) for x in batch]
    noised = model.network.denoising(targets, model.network.query_selection.num_queries)
    boxes = cxcywh_to_xyxy(noised.queries.box_logits.sigmoid()).cpu()  # (B, T, 4)
    kinds = (POSITIVE, NEGATIVE)[: model.network.denoising.KINDS]
    part = boxes.shape[1] // max(1, len(kinds) * noised.num_groups)  # slots of a kind in a group
    drawn = []
    for x, slots in zip(batch, boxes, strict=True):
        height, width = x["image"].shape[1:]
        count = len(x["instances"]) if noised.num_groups else 0
        queries = slots * torch.tensor([width, height, width, height])
        picture = _to_picture(x["image"])
        for kind, colour in reversed(list(enumerate(kinds))):  # positives lie above negatives
            picture = _draw(picture, queries[kind * part : kind * part + count], colour)
        drawn.append(_draw_truth(picture, x, names))
    _save_grid(drawn, path)


def draw_objects(_: nn.Module, batch: list[dict], names: list[str], path: str) -> None:
    """Draw a training batch of a detector that has no denoising queries."""
    _save_grid([_draw_truth(_to_picture(x["image"]), x, names) for x in batch], path)


@torch.no_grad()
def draw_predictions(model: DINODetector, batch: list[dict], names: list[str], path: str, threshold: float) -> None:
    """Draw what the model finds with at least the score `threshold` (yellow), above the truth (green).

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
        picture = _draw(_to_picture(x["image"]), truth, TRUTH)
        drawn.append(_draw(picture, found.pred_boxes.tensor, FOUND, texts))
    if comm.is_main_process():
        _save_grid(drawn, path)


def _to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 RGB -> Pillow's image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _draw_truth(picture: Image.Image, x: dict, names: list[str]) -> Image.Image:
    """A picture with the objects of its dict, and their names."""
    instances = x["instances"]
    texts = [names[label] for label in instances.gt_classes.tolist()]
    return _draw(picture, instances.gt_boxes.tensor, TRUTH, texts)


def _draw(picture: Image.Image, boxes: Tensor, colour: Colour, texts: Sequence[str] = ()) -> Image.Image:
    """A picture with boxes (N, 4), xyxy in pixels, in one colour."""
    return draw_boxes(picture, boxes.tolist(), [colour] * len(boxes), texts, width=1)


def _save_grid(pictures: list[Image.Image], path: str) -> None:
    """Write pictures of any sizes side by side as a PNG."""
    grid = tile_images(pictures, columns=int(np.ceil(len(pictures) ** 0.5)))
    write_whole(Path(path), lambda part: grid.save(part, format="png"))
