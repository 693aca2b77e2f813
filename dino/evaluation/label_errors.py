"""Likely label errors: where annotations and a model's detections disagree, ranked.

Four kinds, each with a score in [0, 1] that ranks it:

- missing: a confident detection that no annotation explains; the detection's score.
- class: the best detection on an annotation (IoU of at least 0.5) has another class; its score, less the score that the
  model gives to the annotated class there.
- box: the detection of an annotation fits worse than the model usually fits; its score, times the share by which the
  IoU falls short of the usual one.
- spurious: no detection where the model usually finds objects of this class and size; the usual score, less twice
  the best score there: a weak detection speaks for another kind.

"Usual" is the median over the annotations of the same class that are nearest in size: a model finds small objects with
lower scores and places them less exactly. A model confirms what it learned: use detections by a model that was not
trained on these annotations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask
from scipy.ndimage import median_filter

KINDS = {
    "missing": "found by the model, not annotated",
    "class": "another class than the model finds",
    "box": "boxes that fit badly",
    "spurious": "annotated, not found by the model",
}
LEAST_SCORE = 0.05  # of a detection that is looked at
_LEAST = 0.1  # score of a proposal
_SAME, _NEAR = 0.5, 0.1  # IoU from which a detection is on an annotation; from which one of its class may belong to it
_ONE_OBJECT = 0.6  # IoU of two detections of one object
_ONE_MISSING = 0.4  # the same, among those that no annotation explains
_FITS = 0.8  # of the usual IoU: boxes from here on are no errors
_WINDOW = 51  # annotations whose median is the usual value
_MOST_CELLS, _MOST_DETECTIONS, _FEWEST_DETECTIONS = 20_000_000, 2000, 300  # of one image: bounds of memory


class LabelError(NamedTuple):
    """A proposal.

    Args:
        kind: key of KINDS.
        score: in [0, 1], larger for likelier errors of this kind.
        image_id: of its image.
        category_id, box: what the annotation should be (xywh in pixels); for a spurious one, what it is.
        annotation: that is doubted; None for a missing one.
    """

    kind: str
    score: float
    image_id: int
    category_id: int
    box: list[float]
    annotation: dict | None = None


class _Label(NamedTuple):
    """An annotation, and what the model finds there.

    Args:
        area: of its box.
        own, box, iou: score, box and IoU of the matched detection if it has the annotated class, else 0 and none.
        there: score of the annotated class at an IoU of at least 0.5.
        other, other_class: score and class of the matched detection if it has another class, else 0.
        best: score of the best detection, of any class, that is matched or has an IoU of at least 0.5.
    """

    annotation: dict
    area: float
    own: float
    box: list[float]
    iou: float
    there: float
    other: float
    other_class: int
    best: float


def find_label_errors(
    data: dict[str, Any], results: list[dict], *, known: Collection[int] | None = None
) -> list[LabelError]:
    """Rank the likely label errors of a data set, the likeliest first; at most one for each annotation.

    Args:
        data: checked COCO-format annotations. Crowd regions are not judged, nor is what is found inside them.
        results: COCO-format detections of these images, with all scores from LEAST_SCORE on.
        known: ids of the classes that the model knows; annotations of other classes are not judged. None for all.
    """
    annotations, detections = _by_image(data["annotations"]), _by_image(results)
    labels: list[_Label] = []
    errors: list[LabelError] = []
    for image in data["images"]:
        view = _View.of(annotations[image["id"]], detections[image["id"]])
        partners = view.match()
        errors += view.missing(image["id"], partners)
        labels += view.labels(partners)
    judged = [x for x in labels if known is None or x.annotation["category_id"] in known]
    errors += _doubts(judged)
    return sorted((e for e in errors if e.score >= _LEAST), key=lambda e: -e.score)


def _by_image(entries: list[dict]) -> dict[int, list[dict]]:
    """Entries with a box of positive size, by image id."""
    groups = defaultdict(list)
    for entry in entries:
        if all(map(math.isfinite, entry["bbox"])) and min(entry["bbox"][2:]) > 0:
            groups[entry["image_id"]].append(entry)
    return groups


class _View(NamedTuple):
    """Annotations and detections of one image.

    Args:
        annotations: A without crowd regions.
        detections: D, best first, one for each object; boxes that several classes share belong to the best one.
        iou: (A, D).
        scores: (A, D) of the annotated class, 0 for detections of other classes. All detections count: not only the
            best of each object.
        all_iou: (A, ·) with all detections, and `all_scores` (·,), `all_classes` (·,) theirs.
        crowded: (D,) whether it lies in a crowd region.
    """

    annotations: list[dict]
    detections: list[dict]
    iou: np.ndarray
    all_iou: np.ndarray
    all_scores: np.ndarray
    all_classes: np.ndarray
    crowded: np.ndarray

    @classmethod
    def of(cls, annotations: list[dict], detections: list[dict]) -> _View:
        """Sort the detections, and join those of one object."""
        crowds = [a for a in annotations if a.get("iscrowd")]
        annotations = [a for a in annotations if not a.get("iscrowd")]
        most = min(max(_MOST_CELLS // max(len(annotations), 1), _FEWEST_DETECTIONS), _MOST_DETECTIONS)
        found = sorted((d for d in detections if d["score"] >= LEAST_SCORE), key=lambda d: -d["score"])[:most]
        kept = _first_of_each(_overlaps(found, found), _ONE_OBJECT)
        all_iou = _overlaps(annotations, found)
        leads = [found[i] for i in kept]
        return cls(
            annotations=annotations,
            detections=leads,
            iou=all_iou[:, kept],
            all_iou=all_iou,
            all_scores=np.array([d["score"] for d in found]),
            all_classes=np.array([d["category_id"] for d in found], dtype=np.int64),
            crowded=(_overlaps(leads, crowds, crowd=True) >= _SAME).any(1),
        )

    def match(self) -> dict[int, int]:
        """Pairs of annotation and detection, the closest and surest first: each takes part in one at most.

        A detection of the annotated class may be far (a shifted box), one of another class must be close.
        """
        classes = np.array([a["category_id"] for a in self.annotations], dtype=np.int64)
        found = np.array([d["category_id"] for d in self.detections], dtype=np.int64)
        same = classes[:, None] == found[None]
        rows, columns = np.nonzero(np.where(same, self.iou >= _NEAR, self.iou >= _SAME))
        scores = np.array([d["score"] for d in self.detections])
        affinity = self.iou[rows, columns] * np.sqrt(scores[columns])
        partners: dict[int, int] = {}
        taken = set()
        for place in np.argsort(-affinity, kind="stable").tolist():
            row, column = int(rows[place]), int(columns[place])
            if row not in partners and column not in taken:
                partners[row] = column
                taken.add(column)
        return partners

    def missing(self, image_id: int, partners: dict[int, int]) -> list[LabelError]:
        """Detections that no annotation explains."""
        explained = self.crowded | (self.iou.max(0, initial=0) >= _SAME)
        explained[list(partners.values())] = True
        left = [d for d, known in zip(self.detections, explained, strict=True) if not known]
        left = [left[i] for i in _first_of_each(_overlaps(left, left), _ONE_MISSING)]
        return [LabelError("missing", min(d["score"], 1.0), image_id, d["category_id"], d["bbox"]) for d in left]

    def labels(self, partners: dict[int, int]) -> Iterator[_Label]:
        """What the model finds at each annotation."""
        for row, a in enumerate(self.annotations):
            close = self.all_iou[row] >= _SAME
            own_class = self.all_classes == a["category_id"]
            there, best = (float(self.all_scores[m].max(initial=0)) for m in (close & own_class, close))
            found = self.detections[partners[row]] if row in partners else {"score": 0.0, "category_id": 0, "bbox": []}
            same = found["category_id"] == a["category_id"]
            yield _Label(
                annotation=a,
                area=a["bbox"][2] * a["bbox"][3],
                own=found["score"] if same else 0.0,
                box=found["bbox"],
                iou=float(self.iou[row, partners[row]]) if row in partners and same else 0.0,
                there=there,
                other=0.0 if same else found["score"],
                other_class=found["category_id"],
                best=max(best, found["score"]),
            )


def _overlaps(first: list[dict], second: list[dict], *, crowd: bool = False) -> np.ndarray:
    """(F, S) IoU of boxes; for crowd regions as the second, the share of the first that lies in them."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return mask.iou([x["bbox"] for x in first], [x["bbox"] for x in second], [int(crowd)] * len(second))


def _first_of_each(overlaps: np.ndarray, limit: float) -> list[int]:
    """Indices of boxes, best first, that overlap no better one by `limit`; overlaps (N, N)."""
    kept: list[int] = []
    for index in range(len(overlaps)):
        if not kept or overlaps[index, kept].max() < limit:
            kept.append(index)
    return kept


def _doubts(labels: list[_Label]) -> Iterator[LabelError]:
    """The likeliest error of each annotation, of whatever score."""
    usual_iou = _usual_values(labels, np.array([x.iou for x in labels]), np.array([x.iou > 0 for x in labels]))
    usual_best = _usual_values(labels, np.array([x.best for x in labels]), np.ones(len(labels), dtype=bool))
    for label, fit, expected in zip(labels, usual_iou.tolist(), usual_best.tolist(), strict=True):
        a = label.annotation
        box = [float(value) for value in a["bbox"]]
        place = {"image_id": a["image_id"], "annotation": a}
        spurious = LabelError(
            "spurious", min(expected - 2 * label.best, 1.0), category_id=a["category_id"], box=box, **place
        )
        if label.other > 0:
            score = min(label.other - label.there, 1.0)
            doubt = LabelError("class", score, category_id=label.other_class, box=box, **place)
        else:
            score = min(label.own, 1.0) * (1 - label.iou / fit) if 0 < label.iou < _FITS * fit else 0.0
            doubt = LabelError("box", score, category_id=a["category_id"], box=label.box, **place)
        yield max(doubt, spurious, key=lambda e: e.score)


def _usual_values(labels: list[_Label], values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(N,) median of the valid values among the annotations of the same class that are nearest in size.

    Classes with few of them share the medians of all classes.
    """
    usual = np.zeros(len(labels))
    if not valid.any():
        return usual
    areas = np.array([x.area for x in labels])
    classes = np.array([x.annotation["category_id"] for x in labels])
    everything = np.ones(len(labels), dtype=bool)
    groups = {None: everything, **{c: classes == c for c in np.unique(classes).tolist()}}
    for number, group in groups.items():  # all classes first; large classes replace their part
        basis = np.flatnonzero(group & valid)
        if number is not None and len(basis) < _WINDOW:
            continue
        order = basis[np.argsort(areas[basis], kind="stable")]
        medians = median_filter(values[order], size=_WINDOW, mode="reflect")
        first, last = (np.searchsorted(areas[order], areas[group], side) for side in ("left", "right"))
        usual[group] = medians[((first + last) // 2).clip(max=len(order) - 1)]  # the middle one of equal sizes
    return usual
