"""Pictures of what goes into the detector and of what comes out, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.transforms.functional import pad
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

from dino.d2.meta_arch import DINODetector
from dino.layers.boxes import cxcywh_to_xyxy
from dino.utils.files import write_whole

from .parallel import drop_shards, gather_shards, unwrapped

TRUTH, POSITIVE, NEGATIVE, FOUND = "lime", "deepskyblue", "red", "yellow"
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
    boxes = cxcywh_to_xyxy(noised.queries.box_logits.sigmoid())  # (B, T, 4)
    kinds = (POSITIVE, NEGATIVE)[: model.network.denoising.KINDS]
    part = boxes.shape[1] // max(1, len(kinds) * noised.num_groups)  # slots of a kind in a group
    drawn = []
    for x, target, slots in zip(batch, noised.targets, boxes, strict=True):
        instances = x["instances"]
        height, width = x["image"].shape[1:]
        count = len(target.labels) if noised.num_groups else 0
        queries = slots.cpu() * torch.tensor([width, height, width, height])
        image = x["image"]
        for kind, color in reversed(list(enumerate(kinds))):  # positives lie above negatives
            image = boxed(image, queries[kind * part : kind * part + count], color)
        labels = [names[label] for label in instances.gt_classes.tolist()]
        drawn.append(boxed(image, instances.gt_boxes.tensor, TRUTH, labels))
    save_grid(drawn, path)


def draw_objects(_: nn.Module, batch: list[dict], names: list[str], path: str) -> None:
    """Draw a training batch of a detector that has no denoising queries."""
    drawn = []
    for x in batch:
        labels = [names[label] for label in x["instances"].gt_classes.tolist()]
        drawn.append(boxed(x["image"], x["instances"].gt_boxes.tensor, TRUTH, labels))
    save_grid(drawn, path)


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
        labels = [f"{names[label]} {score:.2f}" for label, score in pairs]
        drawn.append(boxed(boxed(x["image"], truth, TRUTH), found.pred_boxes.tensor, FOUND, labels))
    if comm.is_main_process():
        save_grid(drawn, path)


def boxed(image: Tensor, boxes: Tensor, color: str, labels: list[str] | None = None) -> Tensor:
    """(3, H, W) uint8 with boxes (N, 4), xyxy in pixels, drawn into it."""
    boxes = boxes.cpu().clamp(min=0)
    boxes = torch.min(boxes, boxes.new_tensor([image.shape[2] - 1, image.shape[1] - 1] * 2))
    usable = (boxes[:, 2:] >= boxes[:, :2]).all(1)
    if not usable.any():
        return image
    labels = [label for label, use in zip(labels, usable.tolist(), strict=True) if use] if labels else None
    return draw_bounding_boxes(image, boxes[usable], labels, colors=color, width=1)


def save_grid(images: list[Tensor], path: str) -> None:
    """Write images (3, H, W) uint8 of any sizes side by side, up to four in a row."""
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    padded = [pad(image, [0, 0, width - image.shape[2], height - image.shape[1]], fill=40) for image in images]
    grid = make_grid(torch.stack(padded).float() / 255, nrow=int(np.ceil(len(images) ** 0.5)), padding=4)
    write_whole(Path(path), lambda part: save_image(grid, part, format="png"))
