"""Comparison of an exported program with its network, on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou
from tqdm import tqdm

from dino.data.coco import CocoImages
from dino.data.images import read_image
from dino.evaluation.average_precision import evaluate, to_results
from dino.inference.tiling import scale
from dino.layers import Detections
from dino.modeling.detector import Detector
from dino.utils.files import DataError

from .export_formats import Run
from .export_wrapper import ExportWrapper, Fixed, Prepared, prepare

_LOWEST_SCORE = 0.05  # of the detections that are compared; AP counts all
_SAME_IOU = 0.9  # above it, two boxes of a label are the same detection


class _Picture(NamedTuple):
    """An image of the comparison."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    image_id: int | None  # in the annotations


class Limits(NamedTuple):
    """Largest differences that are accepted."""

    missing: float = 0.02  # share of detections without a partner: a tie in the selection of tokens moves one or two
    box: float = 0.5  # pixels of the resized image
    score: float = 0.01
    ap: float = 0.001  # 0.1 points


class Comparison(NamedTuple):
    """Result of `compare`."""

    images: int
    detections: int  # of the network, with a score of at least `_LOWEST_SCORE`
    matched: int
    box: float  # the largest difference of a coordinate, pixels of the resized image
    score: float
    ap: tuple[float, float] | None  # of the network and of the exported program

    def __str__(self) -> str:
        lines = [
            f"compared on {self.images} images: {self.matched} of {self.detections} detections are the same",
            f"largest difference: boxes {self.box:.3g} pixels, scores {self.score:.3g}",
        ]
        if self.ap:
            network, exported = (100 * value for value in self.ap)
            lines.append(
                f"AP {network:.1f} of the network, {exported:.1f} exported, difference {exported - network:+.3f}"
            )
        return "\n".join(lines)

    def issues(self, limits: Limits) -> list[str]:
        """Differences above the limits, in words; empty if there are none."""
        found = []
        if self.detections - self.matched > limits.missing * self.detections:
            found.append(f"{self.detections - self.matched} of {self.detections} detections are missing or moved")
        if self.box > limits.box:
            found.append(f"boxes differ by up to {self.box:.3g} pixels, {limits.box:g} are allowed")
        if self.score > limits.score:
            found.append(f"scores differ by up to {self.score:.3g}, {limits.score:g} are allowed")
        if self.ap and self.ap[0] - self.ap[1] > limits.ap:
            found.append(f"AP falls by {100 * (self.ap[0] - self.ap[1]):.2f} points, {100 * limits.ap:g} are allowed")
        return found


def compare(
    detector: Detector,
    run: Run,
    source: list[Path] | CocoImages,
    *,
    resize: dict[str, Any],
    fixed: Fixed | None = None,
) -> Comparison:
    """Run the network in the usual way and the exported program on the same pixels.

    Args:
        detector: the network with its preprocessing, not the copy that was exported.
        run: the exported program.
        source: images, files, or a data set from `read_data`, which alone gives an AP.
        resize: the rule, see `prepare`.
        fixed: the only size that the program takes.

    Raises:
        DataError: no detection scores enough to be compared.
    """
    data = source if isinstance(source, CocoImages) else None
    differences: list[tuple[float, float] | None] = []
    results: tuple[list, list] = [], []  # of the network and of the exported program, in COCO's format
    read = pictures(source, detector.preprocessing.input_range)
    for picture in tqdm(read, desc="verify", total=len(source), disable=None):
        inputs = prepare(picture.pixels, resize)
        pair = run_network(detector, inputs), run_exported(run, inputs, fixed)
        differences += _match(*pair)
        for found, entries in zip(pair, results, strict=True):
            entries += _to_results(found, inputs, picture, data)
    if not differences:
        raise DataError(f"nothing to compare: in {len(source)} images nothing scores {_LOWEST_SCORE} or more")
    ap = tuple(evaluate(data.data, entries)["AP"] for entries in results) if data is not None else None
    same = [*filter(None, differences)]
    box, score = (max(values) for values in zip(*same, strict=True)) if same else (0.0, 0.0)
    return Comparison(len(source), len(differences), len(same), box, score, ap)


@torch.no_grad()
def run_network(detector: Detector, inputs: Prepared) -> Detections:
    """Detect by the network itself, with the operator that runs by default."""
    return Detections(*(x[0] for x in ExportWrapper(detector)(*map(torch.from_numpy, inputs))))


def _to_results(found: Detections, inputs: Prepared, picture: _Picture, data: CocoImages | None) -> list[dict]:
    """Entries of COCO's results format, in pixels of the picture; none without data."""
    if data is None:
        return []
    scaled = scale(found, inputs.sizes[0].tolist(), picture.pixels.shape[:2])
    return to_results(scaled, picture.image_id, data.category_ids)


def run_exported(run: Run, inputs: Prepared, fixed: Fixed | None) -> Detections:
    """Detect by an exported program; of several images at once, the first counts."""
    batch = fixed.batch if fixed else 1
    found = run(*(np.repeat(x, batch, 0) for x in inputs))
    return Detections(*(torch.from_numpy(np.array(x[0])) for x in found))


def _match(expected: Detections, found: Detections) -> list[tuple[float, float] | None]:
    """Differences of box and score of each expected detection with a sufficient score, or None if it is missing."""
    keep = expected.scores >= _LOWEST_SCORE
    boxes, scores, labels = (x[keep] for x in expected)
    same = (box_iou(boxes, found.boxes) >= _SAME_IOU) & (labels[:, None] == found.labels)  # (expected, found)
    moved = (boxes[:, None] - found.boxes).abs().amax(-1)
    changed = (scores[:, None] - found.scores).abs()
    cost = (moved + 100 * changed).masked_fill(~same, 1e6)
    pairs = dict(zip(*(x.tolist() for x in linear_sum_assignment(cost.numpy())), strict=True))
    return [
        (moved[i, j].item(), changed[i, j].item()) if (j := pairs.get(i)) is not None and same[i, j] else None
        for i in range(len(boxes))
    ]


def read_data(
    annotations: Path,
    folder: Path,
    names: Sequence[str],
    limit: int,
    input_range: tuple[float, float] | None = None,
) -> CocoImages:
    """The first `limit` images of a data set, and their objects.

    Raises:
        DataError: see `read_annotations`; its classes are not those of the model, or it has no image.
    """
    data = CocoImages(annotations, folder, lambda image, objects: (image, objects), limit, input_range=input_range)
    if data.names != list(names):
        raise DataError(f"{annotations} has the classes {data.names}, the model {list(names)}")
    if not len(data):
        raise DataError(f"no image in {annotations} to verify with")
    return data


def pictures(source: list[Path] | CocoImages, input_range: tuple[float, float] | None = None) -> Iterator[_Picture]:
    """Read one after the other; `input_range` of `read_image`, for a list of files."""
    for index in range(len(source)):
        if isinstance(source, CocoImages):
            image, _, entry = source[index]
            yield _Picture(image.permute(1, 2, 0).numpy(), entry["id"])
        else:
            yield _Picture(read_image(source[index], input_range), None)
