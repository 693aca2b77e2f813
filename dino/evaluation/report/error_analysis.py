"""The figures of the report: COCO's AP, and what happens at each score threshold.

Matching is COCO's: in each image and class, detections in falling order of score take the free object that they overlap
most, if the IoU is 0.5 or more. Which detection is right does not depend on the threshold, so one matching serves all.
Kinds of errors follow TIDE (Bolya et al., arXiv 2008.08115), by overlap alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from dino.data.coco import classes_of
from dino.evaluation.average_precision import precision_of, run_coco, summarise

THRESHOLDS = np.round(np.arange(0.01, 1.0, 0.01), 2)  # of the slider, and of all figures that depend on one
IOU, LOOSE_IOU = 0.5, 0.1  # right from here; badly placed from here
KINDS = ("found", "misplaced", "confused", "duplicate", "false")


class Found(NamedTuple):
    """A detection and what it is.

    Args:
        image, label: id of the image, place of the class.
        box: xywh in pixels.
        kind: one of KINDS.
        target: id of the object that it takes, or whose place it has; 0 for none.
    """

    image: int
    label: int
    box: list[float]
    score: float
    kind: str
    target: int = 0


class Object(NamedTuple):
    """An object of the annotations, no crowd region; `score` is that of the detection that finds it, 0 if none does."""

    id: int
    image: int
    label: int
    box: list[float]
    score: float = 0.0


class ClassRow(NamedTuple):
    """One class: AP as COCO has it (-1 where undefined), and precision, recall and F1 at the threshold of best F1."""

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


class Analysis(NamedTuple):
    """Everything that the report shows.

    Args:
        names: of the classes, in the order of their ids; a label is the place in it.
        ap: "AP", "AP50", "AP75", "APs", "APm", "APl" in [0, 1], -1 where undefined.
        precision: (IoU 10, recall 101, classes) COCO's interpolated precision, -1 where undefined.
        tally: for each kind, and "missed", how many there are at each of THRESHOLDS.
        threshold: of THRESHOLDS, where F1 over all classes is best.
    """

    names: list[str]
    objects: list[Object]
    found: list[Found]
    rows: list[ClassRow]
    ap: dict[str, float]
    precision: np.ndarray
    tally: dict[str, np.ndarray]
    threshold: float


def analyse(data: dict[str, Any], results: list[dict]) -> Analysis:
    """Compare detections with annotations.

    Args:
        data: checked COCO-format annotations with at least one object. results: COCO-format detections, checked.
    """
    coco_eval = run_coco(data, results)
    classes = classes_of(data)
    found, objects = match(coco_eval, classes.labels)
    tally = count(found, objects)
    precision = precision_of(coco_eval)
    return Analysis(
        names=classes.names,
        objects=objects,
        found=found,
        rows=class_rows(classes.names, precision, found, objects),
        ap=summarise(precision),
        precision=precision[..., 0],
        tally=tally,
        threshold=best_threshold(f1_of(*rates(tally))),
    )


def match(coco_eval: COCOeval, labels: dict[int, int]) -> tuple[list[Found], list[Object]]:
    """Detections and objects of the whole set with what became of them; those in crowd regions are left out."""
    truth, detections = coco_eval.cocoGt.anns, coco_eval.cocoDt.anns
    taken: dict[int, int] = {}  # detection -> object
    left = defaultdict(list)  # image -> detections that take nothing
    for cell in cells(coco_eval):
        for number, target, ignored in zip(cell["dtIds"], cell["dtMatches"][0], cell["dtIgnore"][0], strict=True):
            if target and not ignored:
                taken[number] = int(target)
            elif not ignored:
                left[cell["image_id"]].append(detections[number])
    found = [describe(detections[d], labels, "found", target) for d, target in taken.items()]
    for image, group in left.items():
        found += explain(group, coco_eval.cocoGt.imgToAnns[image], labels)
    scores = {target: detections[d]["score"] for d, target in taken.items()}
    objects = [
        Object(number, a["image_id"], labels[a["category_id"]], a["bbox"], scores.get(number, 0.0))
        for number, a in truth.items()
        if not a["iscrowd"]
    ]
    return found, objects


def cells(coco_eval: COCOeval) -> Iterator[dict]:
    """COCO's results of single images and classes, over objects of all sizes."""
    images, areas = len(coco_eval.params.imgIds), len(coco_eval.params.areaRng)
    for start in range(0, len(coco_eval.evalImgs), images * areas):
        yield from filter(None, coco_eval.evalImgs[start : start + images])


def explain(detections: list[dict], objects: list[dict], labels: dict[int, int]) -> Iterator[Found]:
    """What the detections of one image are that take no object."""
    objects = [o for o in objects if not o["iscrowd"]]
    if not objects:
        yield from (describe(d, labels, "false") for d in detections)
        return
    overlaps = mask.iou([d["bbox"] for d in detections], [o["bbox"] for o in objects], [0] * len(objects))
    classes = np.array([o["category_id"] for o in objects])
    for detection, overlap in zip(detections, overlaps, strict=True):
        same = np.where(classes == detection["category_id"], overlap, -1)
        other = np.where(classes == detection["category_id"], -1, overlap)
        if same.max() >= IOU:
            kind, target = "duplicate", same.argmax()
        elif other.max() >= IOU:
            kind, target = "confused", other.argmax()
        elif same.max() >= LOOSE_IOU:
            kind, target = "misplaced", same.argmax()
        else:
            yield describe(detection, labels, "false")
            continue
        yield describe(detection, labels, kind, objects[target]["id"])


def describe(detection: dict, labels: dict[int, int], kind: str, target: int = 0) -> Found:
    """COCO's dict of a detection -> Found."""
    label = labels[detection["category_id"]]
    return Found(detection["image_id"], label, detection["bbox"], detection["score"], kind, target)


def count(found: list[Found], objects: list[Object]) -> dict[str, np.ndarray]:
    """(99,) int64 for each of KINDS and for "missed": how many there are at each of THRESHOLDS."""
    tally = {kind: above([f.score for f in found if f.kind == kind]) for kind in KINDS}
    return tally | {"missed": len(objects) - tally["found"]}


def above(scores: list[float]) -> np.ndarray:
    """How many scores reach each of THRESHOLDS."""
    return len(scores) - np.searchsorted(np.sort(np.array(scores, dtype=np.float64)), THRESHOLDS)


def rates(tally: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Precision (1 where nothing is detected) and recall at each of THRESHOLDS."""
    detected = sum(tally[kind] for kind in KINDS)
    precision = np.divide(tally["found"], detected, out=np.ones(len(THRESHOLDS)), where=detected > 0)
    return precision, tally["found"] / np.maximum(tally["found"] + tally["missed"], 1)


def f1_of(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Harmonic mean; 0 where both are."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_threshold(f1: np.ndarray) -> float:
    """The middle one of the thresholds with the largest F1, far from both ends of a plateau."""
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(THRESHOLDS[best[len(best) // 2]])


def class_rows(names: list[str], precision: np.ndarray, found: list[Found], objects: list[Object]) -> list[ClassRow]:
    """The line of each class; `precision` as of `summarise`."""
    found_of, objects_of = defaultdict(list), defaultdict(list)
    for f in found:
        found_of[f.label].append(f)
    for o in objects:
        objects_of[o.label].append(o)
    rows = []
    for label, name in enumerate(names):
        precisions, recalls = rates(count(found_of[label], objects_of[label]))
        f1 = f1_of(precisions, recalls)
        threshold = best_threshold(f1)
        place = int(np.searchsorted(THRESHOLDS, threshold))
        ap = summarise(precision[:, :, label : label + 1])
        rows.append(
            ClassRow(
                name=name,
                objects=len(objects_of[label]),
                ap=ap["AP"],
                ap50=ap["AP50"],
                ap75=ap["AP75"],
                by_size=(ap["APs"], ap["APm"], ap["APl"]),
                threshold=threshold,
                precision=float(precisions[place]),
                recall=float(recalls[place]),
                f1=float(f1[place]),
            )
        )
    return rows


def confusion(analysis: Analysis) -> np.ndarray:
    """(classes + 1, classes + 1) int64 at the analysis' threshold: rows are true classes, columns predicted ones.

    The last column holds missed objects, the last row detections where nothing of the kind is. Each object is counted
    once: as found, else as the class of the best detection of another class in its place, else as missed.
    """
    size = len(analysis.names) + 1
    matrix = np.zeros((size, size), dtype=np.int64)
    shown = [f for f in analysis.found if f.score >= analysis.threshold]
    mistaken: dict[int, Found] = {}
    for f in shown:
        if f.kind == "confused" and f.score > getattr(mistaken.get(f.target), "score", 0):
            mistaken[f.target] = f
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
