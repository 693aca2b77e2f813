"""ATD(k), how far the queries that detect the objects start from them (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dino.data.coco import CocoImages, collate
from dino.layers import HungarianMatcher
from dino.modeling.detector import Detector
from dino.structures import LayerOutputs, Target


def average_topk_distance(
    detector: Detector, data: CocoImages, k: int = 100, matcher: nn.Module | None = None
) -> float:
    """ATD(k): the mean of the k largest of `anchor_distances` over a data set; lower is better.

    Args:
        detector: in evaluation mode.
        data: the validation images, see `CocoImages.for_detector`.
        k: how many distances; all of them where the data has fewer objects.
        matcher: see `anchor_distances`.

    Returns:
        the mean of L1 distances of boxes with coordinates in [0, 1]; NaN where there is no object.
    """
    loader = DataLoader(data, batch_size=1, collate_fn=collate)
    distances = torch.cat([anchor_distances(detector, images, targets, matcher) for images, targets, _ in loader])
    return distances.sort(descending=True).values[:k].mean().item()


@torch.inference_mode()
def anchor_distances(
    detector: Detector, images: Sequence[Tensor], targets: Sequence[Target], matcher: nn.Module | None = None
) -> Tensor:
    """L1 distances between objects and the initial anchors of the queries that detect them.

    An anchor is the box from which a query starts in the decoder. Which query detects an object is decided as in
    training, by matching the predictions of the last layer. Each image runs alone, as in `Detector.detect`.

    Args:
        detector: in evaluation mode.
        images: B images (3, h, w), RGB, values 0 to 255, already resized.
        targets: the objects of each image.
        matcher: see `SetCriterion`; the paper's `HungarianMatcher` by default.

    Returns:
        (K,) float32 on the CPU, |cx| + |cy| + |w| + |h| of the differences, each a fraction of the image. K is the
        number of objects; fewer in an image with more objects than queries.
    """
    matcher, network, starts = matcher or HungarianMatcher(), detector.network, []
    handle = network.query_selection.register_forward_hook(lambda _, inputs, output: starts.append(output[0]))
    found = [torch.zeros(0)]
    try:
        for image, target in zip(images, targets, strict=True):
            outputs = network(*detector.batch([image]))
            target = Target(*(x.to(detector.device) for x in target))
            last = LayerOutputs(*(x[-1:] for x in outputs.decoder))
            ((pairs,),) = matcher(last, [target])
            query, matched = (torch.as_tensor(x, device=detector.device) for x in pairs)
            anchors = starts.pop().box_logits[0].sigmoid()  # (Q, 4)
            found.append((anchors[query] - target.boxes[matched]).abs().sum(1).cpu())
    finally:
        handle.remove()
    return torch.cat(found)
