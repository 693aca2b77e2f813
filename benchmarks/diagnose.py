"""Why a training learns as it does: figures of its checkpoints, one column each.

    python benchmarks/diagnose.py output/mine/model_0000499.pth output/mine/model_0000999.pth \
        --json val.json --images images --output diagnosis.json

Of every checkpoint, on the given images:

- *proposals*, *layer 1* ...: share of the objects that some box of the encoder's proposals or of a decoder layer
  overlaps by 0.5, whatever its class and score;
- *other query*: share of the objects that the next layer matches to another query than the layer before it;
  *since last*: to another one than the checkpoint of the column before it, in the last layer (instability of matching,
  DN-DETR, arXiv 2203.01305, section 3);
- *gradient*: norms of each part for the losses of the first images, with DINO's own criterion. In training,
  `grad_norm` of metrics.json is that of all parts together;
- what each kind of error costs, and how well scores are calibrated: `dino eval` states it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.cli import report_errors
from dino.data.coco import CocoImages, collate
from dino.layers import HungarianMatcher, SetCriterion, Target
from dino.layers.boxes import box_iou, cxcywh_to_xyxy
from dino.modeling.detector import Detector
from dino.structures import Outputs
from dino.utils.files import DataError, write_whole
from dino.weights.description import detector_from_checkpoint

IOU = 0.5  # from which a box finds an object
PARTS = ("neck.backbone", "neck", "encoder", "query_selection", "denoising", "decoder")  # the first that fits counts


class Seen(NamedTuple):
    """What is recorded of one image.

    Args:
        found: (N + 1, G) bool, objects that a proposal or a box of each layer finds.
        matched: (N, G) int64, the query that each layer matches with an object, -1 for none.
    """

    found: Tensor
    matched: np.ndarray


def finds(boxes: Tensor, target: Target) -> Tensor:
    """(G,) bool: whether any of the boxes (Q, 4) overlaps an object by IOU."""
    overlap = box_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes))  # (Q, G)
    return overlap.amax(0) >= IOU if len(overlap) else torch.zeros(len(target.boxes), dtype=torch.bool)


def see(outputs: Outputs, target: Target, matcher: HungarianMatcher) -> Seen:
    """Record the outputs for one image, B = 1."""
    sets = [*outputs.proposals.boxes, *outputs.decoder.boxes]  # N + 1 of (1, Q, 4)
    pairs = matcher(outputs.decoder, [target])
    matched = np.full((len(pairs), len(target.labels)), -1)
    for layer, [(query, objects)] in zip(matched, pairs, strict=True):
        layer[objects] = query
    return Seen(torch.stack([finds(boxes[0], target) for boxes in sets]), matched)


@torch.no_grad()
def see_all(detector: Detector, data: CocoImages) -> list[Seen]:
    """Record every image that has objects."""
    seen, matcher = [], HungarianMatcher()
    for index in range(len(data)):
        pixels, [target], _ = collate([data[index]])
        if len(target.labels):
            seen.append(see(detector.network(*detector.batch(pixels)), target, matcher))
    if not seen:
        raise DataError("no image has an object: there is nothing to diagnose")
    return seen


def gradient_norms(detector: Detector, data: CocoImages, count: int, seed: int) -> dict[str, float]:
    """Norm of the gradient of each of PARTS, for the first `count` images with objects."""
    chosen = [i for i, entry in enumerate(data.images) if data.objects[entry["id"]]][:count]
    pixels, targets, _ = collate([data[index] for index in chosen])
    learner = Detector(
        detector.network, detector.preprocessing, detector.names, criterion=SetCriterion(matcher=HungarianMatcher())
    )
    torch.manual_seed(seed)  # of the noise
    learner.zero_grad()
    sum(learner.losses(pixels, targets).values()).backward()
    squares = dict.fromkeys(PARTS, 0.0)
    for name, parameter in learner.network.named_parameters():
        part = next((part for part in PARTS if name.startswith(f"{part}.")), None)
        if part and parameter.grad is not None:
            squares[part] += parameter.grad.square().sum().item()
    learner.zero_grad()
    return {part: square**0.5 for part, square in squares.items()}


def figures(seen: list[Seen], before: list[Seen] | None) -> dict[str, float]:
    """The shares of one checkpoint, in [0, 1]; `before` is that of the column before it."""
    found = torch.cat([one.found for one in seen], 1).float().mean(1)  # (N + 1,)
    matched = np.concatenate([one.matched for one in seen], 1)  # (N, objects)
    names = ["proposals", *(f"layer {number}" for number in range(1, len(found)))]
    shares = {f"found by {name}": share for name, share in zip(names, found.tolist(), strict=True)}
    for number, (now, following) in enumerate(pairwise(matched), 1):
        shares[f"other query in layer {number + 1}"] = float((now != following).mean())
    if before:
        earlier = np.concatenate([one.matched for one in before], 1)
        shares["other query since last"] = float((earlier[-1] != matched[-1]).mean())
    return shares


def diagnose(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """File of a checkpoint -> its figures."""
    columns, before = {}, None
    for path in args.weights:
        detector = detector_from_checkpoint(path, copy=args.copy)
        data = CocoImages.for_detector(args.json, args.images, detector)
        seen = see_all(detector, data)
        norms = gradient_norms(detector, data, args.batch, args.seed)
        columns[str(path)] = {**figures(seen, before), **{f"gradient of {key}": norm for key, norm in norms.items()}}
        before = seen
    return columns


def table(columns: dict[str, dict[str, float]]) -> str:
    """The figures as text, a line each; numbers of the columns stand for the files."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [f"{number}: {path}" for number, path in enumerate(columns, 1)]
    lines.append(" " * 28 + "".join(f"{number:>9}" for number in range(1, len(columns) + 1)))
    for row in rows:
        cells = [f"{column[row]:9.3f}" if row in column else " " * 9 for column in columns.values()]
        lines.append(f"{row:<28}" + "".join(cells))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", type=Path, help="checkpoints of one training, in order")
    parser.add_argument("--json", type=Path, required=True, help="annotations in COCO format")
    parser.add_argument("--images", type=Path, required=True, help="folder of their images")
    parser.add_argument("--copy", choices=("model", "ema", "auto"), default="model", help="weights or their average")
    parser.add_argument("--batch", type=int, default=4, help="images of the gradients (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the denoising noise")
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    columns = diagnose(args)
    print(table(columns))
    if args.output:
        write_whole(args.output, lambda part: part.write_text(json.dumps(columns, indent=1) + "\n"))


if __name__ == "__main__":
    sys.exit(report_errors(main))
