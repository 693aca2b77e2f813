"""Comparison of an exported program with its network, on real images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
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
from .verify_batches import Batch, plan

_LOWEST_SCORE = 0.05  # of the detections that are compared; AP counts all
_SAME_IOU = 0.9  # above it, two boxes of a label are the same detection


_BATCHED = 4  # pictures that make the batches
_AT_LEAST = 10  # detections of each of them that are compared, whatever their score

_Difference = tuple[float, float] | None  # of box and score; None if a detection is missing


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


class _Summary(NamedTuple):
    """Of differences; as of `Comparison`."""

    detections: int
    matched: int
    box: float
    score: float


class Case(NamedTuple):
    """Result of `compare` for one kind of batches."""

    kind: str
    worst: str  # sizes of the batch with the largest difference of a box
    detections: int  # of the network: the best ten of a picture at least, whatever their score
    matched: int
    box: float  # as of `Comparison`, like the two below
    score: float
    ap: tuple[float, float] | None

    def __str__(self) -> str:
        ap = ", AP {:.1f} and {:.1f}".format(*(100 * value for value in self.ap)) if self.ap else ""
        differences = f"boxes {self.box:.3g} pixels, scores {self.score:.3g}"
        found = f"{self.matched} of {self.detections} found again"
        return f"{self.kind}: {found}, {differences}{ap}; boxes differ most in {self.worst}"

    def issues(self, limits: Limits) -> list[str]:
        """As `Comparison.issues`, with the name of the case."""
        allowed = max(limits.missing, 1 / self.detections)  # a tie, too, moves one of a few
        return [f"{self.kind} ({self.worst}): {issue}" for issue in _issues(self, limits._replace(missing=allowed))]


class Comparison(NamedTuple):
    """Result of `compare`."""

    images: int
    detections: int  # of the network, with a score of at least `_LOWEST_SCORE`
    matched: int
    box: float  # the largest difference of a coordinate, pixels of the resized image
    score: float
    ap: tuple[float, float] | None  # of the network and of the exported program
    cases: tuple[Case, ...] = ()  # kinds of batches that were compared too

    def __str__(self) -> str:
        lines = [
            f"compared on {self.images} images, each alone: {self.matched} of {self.detections} detections found again "
            f"(same label, IoU of at least {_SAME_IOU})",
            f"largest differences of these: boxes {self.box:.3g} pixels, scores {self.score:.3g}",
        ]
        if self.ap:
            network, exported = (100 * value for value in self.ap)
            lines.append(
                f"AP {network:.2f} of the network, {exported:.2f} exported, difference {exported - network:+.3f}"
            )
        few = ["a few of them in other sizes and batches, where an AP only compares the two programs:"]
        return "\n".join([*lines, *(few if self.cases else []), *(f"  {case}" for case in self.cases)])

    def issues(self, limits: Limits) -> list[str]:
        """Differences above the limits, in words; empty if there are none."""
        return _issues(self, limits) + [issue for case in self.cases for issue in case.issues(limits)]


def _issues(found: Comparison | Case, limits: Limits) -> list[str]:
    """Differences of pictures alone, or of one case, above the limits."""
    issues = []
    if found.detections - found.matched > limits.missing * found.detections:
        lost = f"{found.detections - found.matched} of {found.detections} detections are missing or moved"
        issues.append(f"{lost}, {limits.missing:.0%} are allowed")
    if found.box > limits.box:
        issues.append(f"boxes differ by up to {found.box:.3g} pixels, {limits.box:g} are allowed")
    if found.score > limits.score:
        issues.append(f"scores differ by up to {found.score:.3g}, {limits.score:g} are allowed")
    if found.ap and found.ap[0] - found.ap[1] > limits.ap:
        issues.append(f"AP falls by {100 * (found.ap[0] - found.ap[1]):.2f} points, {100 * limits.ap:g} are allowed")
    return issues


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
    differences: list[_Difference] = []
    results: tuple[list, list] = [], []  # of the network and of the exported program, in COCO's format
    read = pictures(source, detector.preprocessing.input_range)
    first = []  # pictures, for batches
    for picture in tqdm(read, desc="verify", total=len(source), disable=None):
        inputs = prepare(picture.pixels, resize)
        pair = run_network(detector, inputs), run_exported(run, inputs, fixed)
        differences += _match(*pair)
        for found, entries in zip(pair, results, strict=True):
            entries += _to_results(found, inputs.sizes[0], picture, data)
        first += [picture] * (len(first) < _BATCHED)
    if not differences:
        raise DataError(f"nothing to compare: in {len(source)} images nothing scores {_LOWEST_SCORE} or more")
    ap = _average_precisions(data.data, results) if data is not None else None
    found = Comparison(len(source), *_summarise(differences), ap)
    kinds: dict[str, list[Batch]] = {}
    for batch in plan(detector.network, resize, [picture.pixels.shape[:2] for picture in first], fixed):
        kinds.setdefault(batch.kind, []).append(batch)
    cases = (_compare_case(detector, run, batches, first, data) for batches in kinds.values())
    return found._replace(cases=tuple(tqdm(cases, desc="verify batches", total=len(kinds), disable=None)))


def _compare_case(
    detector: Detector, run: Run, batches: Sequence[Batch], first: Sequence[_Picture], data: CocoImages | None
) -> Case:
    """Compare on batches of one kind, made of the pictures `first`."""
    differences: dict[str, list[_Difference]] = {}
    results: tuple[list, list] = [], []
    used: list[_Picture] = []  # numbered anew, since a picture may come in several sizes
    for batch in batches:
        chosen = [first[(batch.first + i) % len(first)] for i in range(len(batch.sizes))]
        inputs = batch.fill([picture.pixels for picture in chosen])
        pairs = zip(_run_all(detector, inputs), _run_batch(run, inputs, batch), strict=True)
        for picture, size, pair in zip(chosen, inputs.sizes, pairs, strict=True):
            differences.setdefault(str(batch), []).extend(_match(*pair, at_least=_AT_LEAST))
            for found, entries in zip(pair, results, strict=True):
                entries += _to_results(found, size, picture._replace(image_id=len(used)), data)
            used.append(picture)
    worst = max(differences, key=lambda name: _summarise(differences[name]).box)
    ap = _average_precisions(_renumber(data.data, used), results) if data is not None else None
    return Case(batches[0].kind, worst, *_summarise([*chain(*differences.values())]), ap)


def _renumber(data: dict[str, Any], used: Sequence[_Picture]) -> dict[str, Any]:
    """Annotations of pictures whose number is their place in `used`, where one can occur several times."""
    entries = {entry["id"]: entry for entry in data["images"]}
    objects: dict[int, list[dict]] = defaultdict(list)
    for entry in data["annotations"]:
        objects[entry["image_id"]].append(entry)
    pairs = [{**entry, "image_id": i} for i, picture in enumerate(used) for entry in objects[picture.image_id]]
    images = [{**entries[picture.image_id], "id": i} for i, picture in enumerate(used)]
    return {**data, "images": images, "annotations": [{**entry, "id": i} for i, entry in enumerate(pairs, 1)]}


def _average_precisions(data: dict[str, Any], results: tuple[list, list]) -> tuple[float, float] | None:
    """AP of the network and of the exported program; None where the images have no object."""
    network, exported = (evaluate(data, entries)["AP"] for entries in results)
    return (network, exported) if network >= 0 else None


def _summarise(differences: Sequence[_Difference]) -> _Summary:
    """Count detections, and take the largest differences."""
    same = [*filter(None, differences)]
    return _Summary(len(differences), len(same), *(max(values) for values in zip(*(same or [(0.0, 0.0)]), strict=True)))


def run_network(detector: Detector, inputs: Prepared) -> Detections:
    """Detect in one image by the network itself, with the operator that runs by default."""
    return _run_all(detector, inputs)[0]


@torch.no_grad()
def _run_all(detector: Detector, inputs: Prepared) -> list[Detections]:
    """As `run_network`, in each image."""
    return [*map(Detections, *ExportWrapper(detector)(*map(torch.from_numpy, inputs)))]


def _run_batch(run: Run, inputs: Prepared, batch: Batch) -> list[Detections]:
    """Detect in each image by an exported program that takes batches of this size.

    Raises:
        DataError: the program fails.
    """
    try:
        found = run(*inputs)
    except Exception as error:  # those of ONNX Runtime have no common class
        first = str(error).strip().splitlines()[0][:300]
        raise DataError(f"the exported program fails for {batch.kind}, {batch}: {first}") from error
    return [*map(Detections, *(torch.from_numpy(np.array(x)) for x in found))]


def _to_results(found: Detections, size: np.ndarray, picture: _Picture, data: CocoImages | None) -> list[dict]:
    """Entries of COCO's results format, in pixels of the picture, given its `size` in the batch; none without data."""
    if data is None:
        return []
    scaled = scale(found, size.tolist(), picture.pixels.shape[:2])
    return to_results(scaled, picture.image_id, data.category_ids)


def run_exported(run: Run, inputs: Prepared, fixed: Fixed | None) -> Detections:
    """Detect by an exported program; of several images at once, the first counts."""
    batch = fixed.batch if fixed else 1
    found = run(*(np.repeat(x, batch, 0) for x in inputs))
    return Detections(*(torch.from_numpy(np.array(x[0])) for x in found))


def _match(expected: Detections, found: Detections, at_least: int = 0) -> list[_Difference]:
    """Differences of each expected detection with a sufficient score, and of the `at_least` best ones."""
    keep = expected.scores >= _LOWEST_SCORE
    keep[:at_least] = True
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
