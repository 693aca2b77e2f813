"""Figures of the report: COCO's AP, and the errors at each score threshold.

Matching is COCO's: in each image and class, detections in falling order of score take the free object of largest
overlap, if the IoU is at least 0.5. Whether a detection is right does not depend on the threshold: one matching serves
all.
Kinds of errors follow TIDE (Bolya et al., arXiv 2008.08115), by overlap alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from dino.data.coco import classes_of
from dino.evaluation.average_precision import precision_of, precision_without, run_coco, summarise

THRESHOLDS = np.round(np.arange(0.01, 1.0, 0.01), 2)  # of the slider and the figures
_IOU, _LOOSE_IOU = 0.5, 0.1  # at least: right; badly placed
ERROR_WORDS = {"false": "false", "duplicate": "double", "misplaced": "badly placed", "confused": "wrong class"}
_KINDS = ("found", *ERROR_WORDS)
_COUNTED_AT = (0.2, 0.3, 0.4, 0.5)  # scores at which the errors in metrics.json are counted
_MOST_PAIRS = 10_000_000  # of detections and objects that are compared at once: 80 MB
_CALIBRATED, _BINS = 0.05, 10  # least score that calibration looks at; bins of scores


class Found(NamedTuple):
    """A detection and its kind.

    Args:
        image, label: id of the image, index of the class.
        box: xywh in pixels.
        kind: one of `_KINDS`.
        target: id of the object that it takes or overlaps; 0 for none.
        id: place in the results, from 1 on.
    """

    image: int
    label: int
    box: list[float]
    score: float
    kind: str
    target: int = 0
    id: int = 0


class Object(NamedTuple):
    """An object of the annotations, no crowd region. `score`: of the detection that finds it, 0 for none."""

    id: int
    image: int
    label: int
    box: list[float]
    score: float = 0.0


class _ErrorCost(NamedTuple):
    """A kind of error, and what it costs: AP of the detections without all of this kind, of whatever score.

    Args:
        kind: one of ERROR_WORDS.
        detections: of this kind at the analysis' threshold.
        at_scores: number of this kind from each score of `_COUNTED_AT` on.
        ap, ap50: without this kind. Fewer double detections can lower `ap`: one may be the better placed.
        gain: of AP50.
    """

    kind: str
    detections: int
    at_scores: dict[str, int]
    ap: float
    ap50: float
    gain: float


class _ClassRow(NamedTuple):
    """One class: COCO's AP (-1 where undefined); precision, recall and F1 at the threshold of best F1."""

    name: str
    objects: int
    ap: float
    ap50: float
    ap75: float
    by_size: tuple[float, float, float]
    threshold: float
    precision: float
    recall: float
    f1: float


# Heading -> figure of a class, for the page and the terminal; negative where undefined, as the best threshold of a
# class that is never found. To add a figure: a field of `_ClassRow`, which goes to metrics.json, its value in
# `_class_rows`, and a line here.
COLUMNS: dict[str, Callable[[_ClassRow], float]] = {
    "AP": lambda row: row.ap,
    "AP50": lambda row: row.ap50,
    "AP75": lambda row: row.ap75,
    "Small": lambda row: row.by_size[0],
    "Medium": lambda row: row.by_size[1],
    "Large": lambda row: row.by_size[2],
    "Threshold": lambda row: row.threshold if row.f1 > 0 else -1.0,
    "Precision": lambda row: row.precision if row.f1 > 0 else -1.0,
    "Recall": lambda row: row.recall if row.objects else -1.0,
    "F1": lambda row: row.f1 if row.objects else -1.0,
}


def show(heading: str, value: float) -> str:
    """A figure of COLUMNS, or an AP by its name, as text: in percent, but for the threshold."""
    if value < 0:
        return "–"
    return f"{value:.2f}" if heading == "Threshold" else f"{100 * value:.1f}"


class Analysis(NamedTuple):
    """Everything that the report shows.

    Args:
        names: of the classes, by label.
        ap: "AP", "AP50", "AP75", "APs", "APm", "APl" in [0, 1], -1 where undefined.
        precision: (IoU 10, recall 101, classes) COCO's interpolated precision, -1 where undefined.
        tally: number of each kind, and of "missed", at each of THRESHOLDS.
        threshold: that of THRESHOLDS with the best F1 over all classes.
        costs: of each kind of error.
        recall: share of the objects that a detection of any score finds, at IoU 0.5.
        calibration_error: see `_calibration_error`.
    """

    names: list[str]
    objects: list[Object]
    found: list[Found]
    rows: list[_ClassRow]
    ap: dict[str, float]
    precision: np.ndarray
    tally: dict[str, np.ndarray]
    threshold: float
    costs: list[_ErrorCost]
    recall: float
    calibration_error: float


def analyse(data: dict[str, Any], results: list[dict]) -> Analysis:
    """Compare detections with annotations.

    Args:
        data: checked COCO-format annotations with at least one object. results: COCO-format detections, checked.
    """
    coco_eval = run_coco(data, results)
    classes = classes_of(data)
    found, objects = _match(coco_eval, classes.labels)
    tally = _count(found, objects)
    precision, threshold = precision_of(coco_eval), _best_threshold(f1_of(*rates(tally)))
    return Analysis(
        names=classes.names,
        objects=objects,
        found=found,
        rows=_class_rows(classes.names, precision, found, objects),
        ap=summarise(precision),
        precision=precision[..., 0],
        tally=tally,
        threshold=threshold,
        costs=_measure_costs(coco_eval, found, tally, threshold),
        recall=sum(f.kind == "found" for f in found) / len(objects),
        calibration_error=_calibration_error(found),
    )


def _match(coco_eval: COCOeval, labels: dict[int, int]) -> tuple[list[Found], list[Object]]:
    """Kind of every detection, score of every object; without detections in crowd regions."""
    detections = coco_eval.cocoDt.anns
    taken: dict[int, int] = {}  # detection -> object
    left = defaultdict(list)  # image -> detections that take nothing
    for cell in _cells(coco_eval):
        for number, target, ignored in zip(cell["dtIds"], cell["dtMatches"][0], cell["dtIgnore"][0], strict=True):
            if target and not ignored:
                taken[number] = int(target)
            elif not ignored:
                left[cell["image_id"]].append(detections[number])
    found = [_describe(detections[d], labels, "found", target) for d, target in taken.items()]
    for image, group in left.items():
        found += _explain(group, coco_eval.cocoGt.imgToAnns[image], labels)
    scores = {target: detections[d]["score"] for d, target in taken.items()}
    return found, _list_objects(coco_eval.cocoGt.anns, labels, scores)


def _list_objects(truth: dict[int, dict], labels: dict[int, int], scores: dict[int, float]) -> list[Object]:
    """Objects of the annotations, without crowd regions; `scores`: of the detections that find them, by object id."""
    return [
        Object(number, a["image_id"], labels[a["category_id"]], a["bbox"], scores.get(number, 0.0))
        for number, a in truth.items()
        if not a["iscrowd"]
    ]


def _cells(coco_eval: COCOeval) -> Iterator[dict]:
    """COCO's results of each image and class, over objects of all sizes."""
    images, areas = len(coco_eval.params.imgIds), len(coco_eval.params.areaRng)
    for start in range(0, len(coco_eval.evalImgs), images * areas):
        yield from filter(None, coco_eval.evalImgs[start : start + images])


def _explain(detections: list[dict], objects: list[dict], labels: dict[int, int]) -> Iterator[Found]:
    """Classify the detections of one image that take no object."""
    objects = [o for o in objects if not o["iscrowd"]]
    if not objects:
        yield from (_describe(d, labels, "false") for d in detections)
        return
    classes = np.array([o["category_id"] for o in objects])
    for detection, overlap in zip(detections, _overlaps(detections, objects), strict=True):
        kind, index = _classify(overlap, classes == detection["category_id"])
        yield _describe(detection, labels, kind, 0 if index is None else objects[index]["id"])


def _overlaps(detections: list[dict], objects: list[dict]) -> Iterator[np.ndarray]:
    """(N,) IoU of each detection with the objects, computed for as many detections as fit into `_MOST_PAIRS`."""
    boxes, step = [o["bbox"] for o in objects], max(1, _MOST_PAIRS // len(objects))
    for start in range(0, len(detections), step):
        yield from mask.iou([d["bbox"] for d in detections[start : start + step]], boxes, [0] * len(objects))


def _classify(overlaps: np.ndarray, same_class: np.ndarray) -> tuple[str, int | None]:
    """Kind of a detection, and index of its object.

    Args:
        overlaps, same_class: (N,) for each object, the IoU and whether the class is that of the detection.
    """
    same, other = np.where(same_class, overlaps, -1), np.where(same_class, -1, overlaps)
    if same.max() >= _IOU:
        return "duplicate", int(same.argmax())
    if other.max() >= _IOU:
        return "confused", int(other.argmax())
    if same.max() >= _LOOSE_IOU:
        return "misplaced", int(same.argmax())
    return "false", None


def _describe(detection: dict, labels: dict[int, int], kind: str, target: int = 0) -> Found:
    """COCO's dict of a detection -> Found."""
    label = labels[detection["category_id"]]
    return Found(detection["image_id"], label, detection["bbox"], detection["score"], kind, target, detection["id"])


def _count(found: list[Found], objects: list[Object]) -> dict[str, np.ndarray]:
    """(99,) int64 for each of `_KINDS` and for "missed": the number at each of THRESHOLDS."""
    tally = {kind: _above([f.score for f in found if f.kind == kind]) for kind in _KINDS}
    return tally | {"missed": len(objects) - tally["found"]}


def _above(scores: list[float]) -> np.ndarray:
    """Number of scores that reach each of THRESHOLDS."""
    return len(scores) - np.searchsorted(np.sort(np.array(scores, dtype=np.float64)), THRESHOLDS)


def rates(tally: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Precision (1 where nothing is detected) and recall at each of THRESHOLDS."""
    detected = sum(tally[kind] for kind in _KINDS)
    precision = np.divide(tally["found"], detected, out=np.ones(len(THRESHOLDS)), where=detected > 0)
    return precision, tally["found"] / np.maximum(tally["found"] + tally["missed"], 1)


def f1_of(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Harmonic mean; 0 where both are."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def _best_threshold(f1: np.ndarray) -> float:
    """The middle one of the thresholds with the largest F1: far from both ends of a plateau."""
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(THRESHOLDS[best[len(best) // 2]])


def _measure_costs(
    coco_eval: COCOeval, found: list[Found], tally: dict[str, np.ndarray], threshold: float
) -> list[_ErrorCost]:
    """What each kind of error costs, the most expensive first."""
    before, at = summarise(precision_of(coco_eval)), int(np.searchsorted(THRESHOLDS, threshold))
    places = dict(zip(map(str, _COUNTED_AT), np.searchsorted(THRESHOLDS, _COUNTED_AT), strict=True))
    costs = []
    for kind in ERROR_WORDS:
        dropped = {f.id for f in found if f.kind == kind}
        after = summarise(precision_without(coco_eval, dropped)) if dropped else before
        costs.append(
            _ErrorCost(
                kind=kind,
                detections=int(tally[kind][at]),
                at_scores={score: int(tally[kind][place]) for score, place in places.items()},
                ap=after["AP"],
                ap50=after["AP50"],
                gain=after["AP50"] - before["AP50"],
            )
        )
    return sorted(costs, key=lambda cost: -cost.gain)


def _calibration_error(found: list[Found]) -> float:
    """Expected calibration error: mean distance of the scores from the share of right detections, over bins of scores.

    In [0, 1], of the detections with a score of at least `_CALIBRATED`; -1 where there are none.
    """
    pairs = [(min(f.score, 1.0), f.kind == "found") for f in found if f.score >= _CALIBRATED]
    if not pairs:
        return -1.0
    scores, right = np.array(pairs, dtype=np.float64).T
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, right - scores)).sum() / len(pairs))


def _class_rows(names: list[str], precision: np.ndarray, found: list[Found], objects: list[Object]) -> list[_ClassRow]:
    """Row of each class; `precision` as of `precision_of`."""
    found_of, objects_of = defaultdict(list), defaultdict(list)
    for f in found:
        found_of[f.label].append(f)
    for o in objects:
        objects_of[o.label].append(o)
    rows = []
    for label, name in enumerate(names):
        precisions, recalls = rates(_count(found_of[label], objects_of[label]))
        f1 = f1_of(precisions, recalls)
        threshold = _best_threshold(f1)
        at = int(np.searchsorted(THRESHOLDS, threshold))
        ap = summarise(precision[:, :, label : label + 1])
        rows.append(
            _ClassRow(
                name=name,
                objects=len(objects_of[label]),
                ap=ap["AP"],
                ap50=ap["AP50"],
                ap75=ap["AP75"],
                by_size=(ap["APs"], ap["APm"], ap["APl"]),
                threshold=threshold,
                precision=float(precisions[at]),
                recall=float(recalls[at]),
                f1=float(f1[at]),
            )
        )
    return rows


def confusion(analysis: Analysis) -> np.ndarray:
    """(classes + 1, classes + 1) int64 at the analysis' threshold: rows are true classes, columns predicted ones.

    The last column counts missed objects, the last row detections without an object. Each object counts once: as found,
    else as the class of the best overlapping detection of another class, else as missed.
    """
    size = len(analysis.names) + 1
    matrix = np.zeros((size, size), dtype=np.int64)
    shown = [f for f in analysis.found if f.score >= analysis.threshold]
    mistaken = _best_confused(shown)
    counted = set()
    for o in analysis.objects:
        if o.score >= analysis.threshold:
            matrix[o.label, o.label] += 1
        elif o.id in mistaken:
            matrix[o.label, mistaken[o.id].label] += 1
            counted.add(id(mistaken[o.id]))
        else:
            matrix[o.label, -1] += 1
    for f in shown:
        if f.kind != "found" and id(f) not in counted:
            matrix[-1, f.label] += 1
    return matrix


def _best_confused(found: list[Found]) -> dict[int, Found]:
    """The best detection of another class at each object, by its id; the first of equals."""
    confused = sorted((f for f in reversed(found) if f.kind == "confused"), key=lambda f: f.score)
    return {f.target: f for f in confused}
