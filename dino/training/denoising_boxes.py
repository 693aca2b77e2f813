"""Boxes of the denoising queries of a batch, for the picture of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dino.inference.palette import Colour
from dino.layers.boxes import cxcywh_to_xyxy
from dino.modeling.dino import DINO
from dino.structures import Target

from .run_pictures import NEGATIVE, POSITIVE


@torch.no_grad()
def denoising_boxes(
    network: DINO, targets: Sequence[Target], sizes: Sequence[Sequence[int]]
) -> list[dict[Colour, Tensor]]:
    """One group of new denoising queries of each image, as `draw_train_batch` wants them.

    Args:
        network: its `denoising` draws the queries.
        targets: objects of each image, on the device of the network.
        sizes: height and width of each image in pixels.
    """
    denoising = network.denoising(targets, network.query_selection.num_queries)
    boxes = cxcywh_to_xyxy(denoising.queries.box_logits.sigmoid()).cpu()  # (B, T, 4)
    kinds = (POSITIVE, NEGATIVE)[: network.denoising.KINDS]
    part = boxes.shape[1] // max(1, len(kinds) * denoising.num_groups)  # slots of a kind in a group
    queries = []
    for (height, width), slots, denoised in zip(sizes, boxes, denoising.targets, strict=True):
        count = len(denoised.labels) if denoising.num_groups else 0  # fewer than the objects of a crowded image
        corners = slots * torch.tensor([width, height, width, height])  # (T, 4), xyxy in pixels
        queries.append({colour: corners[kind * part :][:count] for kind, colour in enumerate(kinds)})
    return queries
