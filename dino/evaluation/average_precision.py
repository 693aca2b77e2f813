"""Average precision of boxes by pycocotools: the only code that runs COCO's evaluation.

AP is in [0, 1], and -1 where it is undefined because a class or a size has no objects.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence, Set
from operator import itemgetter
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino.data.coco import classes_of
from dino.data.coco import to_results as to_results
from dino.data.coco_values import area_of

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCO's twelve
_MOST_IOU = 1 - 1e-10  # COCO's bound of a threshold
_IOU_75 = 5  # index of 0.75 among the ten IoU thresholds from 0.5 to 0.95


def evaluate(data: dict[str, Any], results: list[dict]) -> dict[str, float]:
    """`_METRICS`, and `AP-<name>` of each class; all 0 if there are no results.

    Args:
        data: checked COCO-format annotations.
        results: entries of COCO's results format.
    """
    names = classes_of(data).names
    if not results:
        return dict.fromkeys([*_METRICS, *(f"AP-{name}" for name in names)], 0.0)
    precision = precision_of(run_coco(data, results))
    per_class = {f"AP-{name}": _mean(precision[:, :, label, 0]) for label, name in enumerate(names)}
    return summarise(precision) | per_class


def run_coco(data: dict[str, Any], results: list[dict]) -> COCOeval:
    """Run COCO's evaluation of boxes, silently. Arguments as of `evaluate`; `results` may be empty."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(data)
        # loadRes fails on an empty list, and adds keys to the entries that it gets
        found = truth.loadRes([dict(r) for r in results]) if results else _index({**data, "annotations": []})
        coco_eval = _FastEval(truth, found, "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval


class _FastEval(COCOeval):
    """COCO's evaluation, with all objects of an image and class matched at once: crowded pictures cost no minutes."""

    def evaluateImg(self, imgId, catId, aRng, maxDet) -> dict | None:
        """The result of an image and class for a range of areas, equal to pycocotools'; None where both are empty."""
        objects, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not objects and not found:
            return None
        ignored = _outside(objects, aRng) | _field(objects, "ignore").astype(bool)
        order = np.argsort(ignored, kind="stable")  # objects that count come first
        ranked = np.argsort(-_field(found, "score"), kind="stable")[:maxDet]
        objects, found = [objects[k] for k in order], [found[k] for k in ranked]
        known = self.ious[imgId, catId]  # an empty list where one of both is missing
        overlaps = known[: len(found), order] if len(known) else np.zeros((len(found), len(objects)))
        match = self._match(overlaps, ignored[order], _field(objects, "iscrowd").astype(bool))
        object_ids, found_ids = _field(objects, "id"), _field(found, "id")
        taken = np.zeros((len(match), len(objects)))
        hit = match >= 0
        for t, row in enumerate(match):  # of several in a crowd region, the last one stays
            taken[t, row[hit[t]]] = found_ids[hit[t]]
        return {
            "image_id": imgId,
            "category_id": catId,
            "aRng": aRng,
            "maxDet": maxDet,
            "dtIds": list(map(itemgetter("id"), found)),
            "gtIds": list(map(itemgetter("id"), objects)),
            "dtMatches": np.where(hit, _at(object_ids, match), 0.0),
            "gtMatches": taken,
            "dtScores": list(map(itemgetter("score"), found)),
            "gtIgnore": ignored[order].astype(int),
            "dtIgnore": np.where(hit, _at(ignored[order], match), _outside(found, aRng)),
        }

    def _match(self, overlaps: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> np.ndarray:
        """(T, D) int64, the object that each detection takes at each IoU threshold, -1 for none.

        Args:
            overlaps: (D, G) IoU of detections, best first, and objects, ignored ones last.
            ignored, crowd: (G,) bool, of the objects; a crowd region can be taken more than once.
        """
        thresholds = np.minimum(self.params.iouThrs, _MOST_IOU)
        match = np.full((len(thresholds), len(overlaps)), -1)
        free = np.ones((len(thresholds), overlaps.shape[1]), dtype=bool)
        for d, row in enumerate(overlaps):
            near = np.flatnonzero(row >= thresholds.min())
            if not near.size:
                continue
            fits = (row[near] >= thresholds[:, None]) & free[:, near]  # (T, candidates)
            counts = fits & ~ignored[near]
            fits = np.where(counts.any(1, keepdims=True), counts, fits)
            best = near.size - 1 - np.where(fits, row[near], -1.0)[:, ::-1].argmax(1)  # the last one of equals
            hit = np.flatnonzero(fits.any(1))
            match[hit, d] = chosen = near[best[hit]]
            free[hit, chosen] = crowd[chosen]
        return match


def _field(entries: list[dict], key: str) -> np.ndarray:
    """(N,) float64, a number of each entry."""
    return np.fromiter(map(itemgetter(key), entries), dtype=np.float64, count=len(entries))


def _outside(entries: list[dict], areas: Sequence[float]) -> np.ndarray:
    """(N,) bool, whether the area of an entry is outside a range, whose ends belong to it."""
    values = _field(entries, "area")
    return (values < areas[0]) | (values > areas[1])


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`values` at places; anything where a place is -1."""
    return values[places] if values.size else np.zeros(places.shape, dtype=values.dtype)


def precision_of(coco_eval: COCOeval) -> np.ndarray:
    """(IoU thresholds 10, recalls 101, classes, sizes 4) interpolated precision at 100 detections per image.

    The sizes are all, small, medium, large. -1 where undefined.
    """
    return coco_eval.eval["precision"][..., -1]


def precision_without(coco_eval: COCOeval, dropped: Set[int]) -> np.ndarray:
    """As `precision_of`, but without some detections: (IoU thresholds 10, recalls 101, classes, 1), of all sizes alone.

    A detection that takes no object at an IoU threshold leaves the matches of the other ones there as they are. Only
    images and classes where a dropped detection takes an object at some threshold are matched again.

    Args:
        coco_eval: of `run_coco`; stays as it is.
        dropped: ids of detections, which are their places in the results, from 1 on.
    """
    fewer = copy.copy(coco_eval)
    fewer.params = copy.copy(coco_eval.params)
    fewer.params.areaRng, fewer.params.maxDets = coco_eval.params.areaRng[:1], coco_eval.params.maxDets[-1:]
    fewer._dts, fewer.ious, fewer.evalImgs = {}, {}, list(coco_eval.evalImgs)
    images, areas = len(coco_eval.params.imgIds), len(coco_eval.params.areaRng)
    for start in range(0, len(fewer.evalImgs), images * areas):  # of each class, the first area is that of all sizes
        for place in range(start, start + images):
            cell = fewer.evalImgs[place]
            if cell and not dropped.isdisjoint(cell["dtIds"]):
                fewer.evalImgs[place] = _drop(coco_eval, fewer, cell, dropped)
    with contextlib.redirect_stdout(io.StringIO()):
        fewer.accumulate(fewer.params)
    return fewer.eval["precision"][..., -1]


def _drop(coco_eval: COCOeval, fewer: COCOeval, cell: dict, dropped: Set[int]) -> dict | None:
    """COCO's result of an image and class without some detections; `fewer` is `coco_eval` with room for new matches."""
    gone = np.array([number in dropped for number in cell["dtIds"]])
    if not cell["dtMatches"][:, gone].any():
        kept = {key: [x for x, out in zip(cell[key], gone, strict=True) if not out] for key in ("dtIds", "dtScores")}
        return {**cell, **kept, **{key: cell[key][:, ~gone] for key in ("dtMatches", "dtIgnore")}}
    key = cell["image_id"], cell["category_id"]
    fewer._dts[key] = [d for d in coco_eval._dts[key] if d["id"] not in dropped]
    fewer.ious[key] = fewer.computeIoU(*key)
    return fewer.evaluateImg(*key, fewer.params.areaRng[0], fewer.params.maxDets[0])


def summarise(precision: np.ndarray) -> dict[str, float]:
    """`_METRICS` of `precision_of`, or of a part of its classes; the first three if it is of all sizes alone."""
    by_size = [precision[..., size] for size in range(precision.shape[-1])]
    parts = (by_size[0], by_size[0][0], by_size[0][_IOU_75], *by_size[1:])
    return dict(zip(_METRICS, map(_mean, parts), strict=False))


def complete_annotations(annotations: list[dict]) -> list[dict]:
    """Copies with `area` and `iscrowd`, and with ids from 1 on: COCO's evaluation takes 0 for "not found".

    Scores are left out: Detectron2's evaluation would read those of predictions that serve as annotations.
    """
    complete = []
    for number, a in enumerate(annotations, 1):
        entry = {"area": area_of(a["bbox"]), "iscrowd": 0, **a, "id": number}
        entry.pop("score", None)
        complete.append(entry)
    return complete


def _index(data: dict[str, Any]) -> COCO:
    """pycocotools' view of parsed annotations."""
    coco = COCO()
    coco.dataset = {"info": {}, **data, "annotations": complete_annotations(data["annotations"])}
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float:
    """Mean of the defined values, -1 if there are none."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0
