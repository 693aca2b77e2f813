import numpy as np
import pytest

from dino.data.coco import CocoImages
from dino.evaluation.average_precision import evaluate
from dino.evaluation.report import error_analysis
from dino.evaluation.report.error_analysis import (
    _KINDS,
    COLUMNS,
    ERROR_WORDS,
    THRESHOLDS,
    Found,
    _best_threshold,
    _calibration_error,
    analyse,
    confusion,
    f1_of,
    rates,
    show,
)

from ...coco_files import write_coco
from .detections import imperfect


def grid(columns=6, rows=5, images=4, crowd=False):
    """Annotations of objects that are far apart from each other, 20x20 pixels in cells of 60x60; ids start at 0."""
    entries = [{"id": n, "file_name": f"{n}.png", "width": 60 * columns, "height": 60 * rows} for n in range(images)]
    annotations = []
    for image in entries:
        for cell in range(columns * rows):
            x, y = 60 * (cell % columns) + 15, 60 * (cell // columns) + 15
            category = (7, 40)[len(annotations) % 2]
            box = [x, y, 20, 20]
            annotations.append({"id": len(annotations), "image_id": image["id"], "category_id": category, "bbox": box})
    if crowd:
        annotations[0]["iscrowd"] = 1
    categories = [{"id": 40, "name": "dog"}, {"id": 7, "name": "cat"}]
    return {"images": entries, "annotations": annotations, "categories": categories}


def perfect(data, score=0.9):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": score}
        for a in data["annotations"]
    ]


def at(analysis, threshold):
    place = int(np.searchsorted(THRESHOLDS, threshold))
    return {kind: int(counts[place]) for kind, counts in analysis.tally.items()}


def test_perfect_detections():
    """Object ids start at 0, which pycocotools alone would count as missed."""
    data = grid()
    analysis = analyse(data, perfect(data))
    assert analysis.ap == {"AP": 1, "AP50": 1, "AP75": 1, "APs": 1, "APm": -1, "APl": -1}
    assert analysis.names == ["cat", "dog"]
    assert [(row.objects, row.ap, row.precision, row.recall, row.f1) for row in analysis.rows] == [(60, 1, 1, 1, 1)] * 2
    assert at(analysis, 0.5) == {"found": 120, "misplaced": 0, "confused": 0, "duplicate": 0, "false": 0, "missed": 0}
    assert at(analysis, 0.91) == {"found": 0, "misplaced": 0, "confused": 0, "duplicate": 0, "false": 0, "missed": 120}
    assert analysis.threshold == pytest.approx(0.45, abs=0.011)  # the middle of the plateau
    assert confusion(analysis).tolist() == [[60, 0, 0], [0, 60, 0], [0, 0, 0]]


def test_no_detections_at_all():
    analysis = analyse(grid(), [])
    assert analysis.ap["AP"] == 0
    assert at(analysis, 0.5)["missed"] == 120
    assert [row.recall for row in analysis.rows] == [0, 0]
    shown = {heading: show(heading, value(analysis.rows[0])) for heading, value in COLUMNS.items()}
    assert [shown[heading] for heading in ("Threshold", "Precision", "Recall", "F1")] == ["–", "–", "0.0", "0.0"]
    assert confusion(analysis).tolist() == [[0, 0, 60], [0, 0, 60], [0, 0, 0]]


def test_every_kind_of_error_is_told_apart():
    data = grid(columns=5, rows=1, images=1)  # classes cat, dog, cat, dog, cat
    entries = perfect(data)
    entries[0] = {**entries[0], "bbox": [27, 15, 20, 20]}  # IoU 0.25
    entries[1] = {**entries[1], "category_id": 7}
    entries[2] = {**entries[2], "score": 0.8}
    entries.append({**entries[2], "score": 0.7})
    entries.append({**entries[3], "bbox": [200, 50, 8, 8]})
    del entries[4]
    analysis = analyse(data, entries)
    assert at(analysis, 0.5) == {"found": 2, "misplaced": 1, "confused": 1, "duplicate": 1, "false": 1, "missed": 3}
    assert at(analysis, 0.75)["duplicate"] == 0
    # truth cat: one found, two missed; truth dog: one found, one taken for a cat
    matrix = confusion(analysis._replace(threshold=0.5))
    assert matrix.tolist() == [[1, 0, 2], [1, 1, 0], [2, 1, 0]]


def test_crowd_regions_are_neither_objects_nor_errors():
    data = grid(columns=2, rows=1, images=1, crowd=True)
    analysis = analyse(data, perfect(data))
    assert at(analysis, 0.5) == {"found": 1, "misplaced": 0, "confused": 0, "duplicate": 0, "false": 0, "missed": 0}
    assert [o.label for o in analysis.objects] == [1]


def test_one_matching_serves_all_thresholds():
    """The same counts as when the detections below the threshold were never there."""
    data = grid()
    results, _ = imperfect(data, seed=3)
    analysis = analyse(data, results)
    for threshold in (0.05, 0.3, 0.5, 0.77):
        fewer = analyse(data, [r for r in results if r["score"] >= threshold])
        assert at(analysis, threshold) == at(fewer, 0.01), threshold


@pytest.mark.parametrize("seed", range(3))
def test_planted_errors_are_counted(seed):
    data = grid()
    results, done = imperfect(data, seed)
    tally = at(analyse(data, results), 0.01)
    assert tally["found"] == done["found"] + done["duplicate"]
    assert tally["duplicate"] == done["duplicate"]
    assert tally["confused"] == done["confused"]
    assert tally["missed"] == done["missed"] + done["misplaced"] + done["confused"]
    assert sum(tally[kind] for kind in _KINDS) == len(results)


def test_ap_is_that_of_the_other_road(tmp_path):
    """`evaluate`, which the plain engine and the export use, says the same."""
    files = write_coco(tmp_path, counts=(5, 3, 0, 4))
    results, _ = imperfect(files.read(), seed=1)
    images = CocoImages(*files, transforms=None)
    expected = evaluate(images.data, results)
    analysis = analyse(files.read(), results)
    assert analysis.ap == pytest.approx({name: expected[name] for name in analysis.ap})
    assert {row.name: row.ap for row in analysis.rows} == pytest.approx({n: expected[f"AP-{n}"] for n in images.names})


def test_rows_of_the_confusion_matrix_are_the_objects():
    data = grid()
    results, _ = imperfect(data, seed=5)
    analysis = analyse(data, results)
    matrix = confusion(analysis)
    assert matrix[:-1].sum(1).tolist() == [60, 60]
    assert matrix[:, :-1].sum() == sum(f.score >= analysis.threshold for f in analysis.found)


def test_best_threshold_is_in_the_middle_of_a_plateau():
    f1 = np.zeros(99)
    f1[20:41] = 0.5
    assert _best_threshold(f1) == 0.31
    zero = {kind: np.zeros(99, dtype=int) for kind in (*_KINDS, "missed")}
    assert f1_of(*rates(zero)).tolist() == [0] * 99


def cost_of(analysis, kind):
    (cost,) = [cost for cost in analysis.costs if cost.kind == kind]
    return cost


def test_each_kind_of_error_costs_what_its_removal_gains():
    """As many entries are dropped from the results by hand, and AP computed anew."""
    data = grid(images=10)
    results, _ = imperfect(data, seed=4)
    analysis = analyse(data, results)
    kinds = {f.id: f.kind for f in analysis.found}
    assert set(kinds) == set(range(1, len(results) + 1))
    assert {cost.kind for cost in analysis.costs} == set(ERROR_WORDS)
    assert [c.gain for c in analysis.costs] == sorted((c.gain for c in analysis.costs), reverse=True)
    for cost in analysis.costs:
        fewer = analyse(data, [r for n, r in enumerate(results, 1) if kinds[n] != cost.kind])
        assert (cost.ap, cost.ap50) == pytest.approx((fewer.ap["AP"], fewer.ap["AP50"]))
        assert cost.gain == pytest.approx(fewer.ap["AP50"] - analysis.ap["AP50"])
        assert cost.kind in kinds.values()
        assert cost.detections == at(analysis, analysis.threshold)[cost.kind]
        assert cost.at_scores == {str(t): at(analysis, t)[cost.kind] for t in (0.2, 0.3, 0.4, 0.5)}
    assert max(cost.gain for cost in analysis.costs) > 0
    assert analysis.recall == sum(kind == "found" for kind in kinds.values()) / 300


def test_a_double_detection_costs_precision():
    """Right at scores 0.9 and 0.7, a double one between them: precision is 1 up to recall 0.5, then 2/3."""
    data = grid(columns=4, rows=1, images=1)  # two objects of each class
    results = perfect(data)
    results = [{**r, "score": score} for r, score in zip(results, (0.9, 0.9, 0.7, 0.9), strict=True)]
    results.append({**results[0], "bbox": [16, 15, 20, 20], "score": 0.8})
    cost = cost_of(analyse(data, results), "duplicate")
    assert cost.ap50 == 1
    assert cost.gain == pytest.approx((1 - (51 + 50 * 2 / 3) / 101) / 2)  # the other class has none
    assert cost.detections == 1


def test_costs_without_detections_and_with_one_class():
    analysis = analyse(grid(), [])
    assert [(c.detections, c.ap, c.ap50, c.gain) for c in analysis.costs] == [(0, 0, 0, 0)] * 4
    assert (analysis.recall, analysis.calibration_error) == (0, -1)
    data = grid()
    data["categories"] = [{"id": 7, "name": "cat"}]
    for a in data["annotations"]:
        a["category_id"] = 7
    analysis = analyse(data, perfect(data))
    assert [(c.detections, c.ap, c.ap50, c.gain) for c in analysis.costs] == [(0, 1, 1, 0)] * 4
    assert analysis.recall == 1


def test_detections_in_crowd_regions_cost_nothing():
    data = grid(columns=2, rows=1, images=1, crowd=True)
    inside = {"image_id": 0, "category_id": 7, "bbox": [16, 16, 5, 5], "score": 0.95}
    analysis = analyse(data, [*perfect(data), inside, {**inside, "category_id": 40}])
    assert sum(c.detections for c in analysis.costs) == 1  # the dog in the cats' crowd region
    assert cost_of(analysis, "false").detections == 1
    assert cost_of(analysis, "duplicate").at_scores == {"0.2": 0, "0.3": 0, "0.4": 0, "0.5": 0}


def test_calibration():
    def found(score, kind):
        return Found(0, 0, [0, 0, 1, 1], score, kind)

    assert _calibration_error([found(0.04, "false")]) == -1
    honest = [found(0.75, kind) for kind in ("found", "found", "found", "false")]
    assert _calibration_error(honest) == pytest.approx(0)
    assert _calibration_error([found(0.95, "false")] * 3) == pytest.approx(0.95)
    # Errors of bins do not cancel: two bins, one too sure by 0.5, one too modest by 0.5
    assert _calibration_error([found(0.5, "false"), found(0.45, "found")]) == pytest.approx((0.5 + 0.55) / 2)
    assert _calibration_error([found(1e9, "found"), found(1.0, "found")]) == pytest.approx(0)


@pytest.mark.parametrize("most", [1, 60])
def test_pairs_are_compared_in_parts_that_fit_into_memory(monkeypatch, tmp_path, most):
    data = write_coco(tmp_path, counts=(5, 0, 7)).read()
    results, _ = imperfect(data, seed=1)
    numbered = [{**result, "id": number} for number, result in enumerate(results, 1)]
    sizes, iou = [], error_analysis.mask.iou

    def watched(found, objects, crowd):
        sizes.append(len(found) * len(objects))
        return iou(found, objects, crowd)

    monkeypatch.setattr(error_analysis, "_MOST_PAIRS", most)
    monkeypatch.setattr(error_analysis.mask, "iou", watched)
    parts = list(error_analysis._explain(numbered, data["annotations"], {1: 0, 2: 1, 3: 2}))
    assert max(sizes) <= max(most, len(data["annotations"]))
    monkeypatch.undo()
    assert parts == list(error_analysis._explain(numbered, data["annotations"], {1: 0, 2: 1, 3: 2}))
