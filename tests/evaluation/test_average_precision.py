import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from dino.data.coco import CocoImages
from dino.evaluation import average_precision
from dino.evaluation.average_precision import (
    _METRICS,
    complete_annotations,
    evaluate,
    precision_of,
    precision_without,
    run_coco,
    summarise,
    to_results,
)
from dino.layers import Detections

from ..coco_files import write_coco


def unchanged(image, objects):
    return image, objects


def perfect_results(data):
    """What a detector would say that finds every object of a `CocoImages`."""
    results = []
    for image in data.images:
        objects = data.objects[image["id"]]
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([label for label, _ in objects], dtype=torch.int64)
        results += to_results(Detections(boxes, torch.ones(len(labels)), labels), image["id"], data.category_ids)
    return results


def drop_extras(content):
    del content["info"]
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]


@pytest.mark.parametrize("change", [drop_extras, lambda content: None], ids=["bare", "full"])
def test_true_boxes_reach_the_highest_precision(tmp_path, change):
    files = write_coco(tmp_path, counts=(2, 0, 3, 1), category_ids=(7, 40, 900))
    files.change(change)
    data = CocoImages(*files, unchanged)
    metrics = evaluate(data.data, perfect_results(data))
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == pytest.approx(1)
    assert metrics["AP-red"] == pytest.approx(1)
    assert metrics["APl"] == -1  # no object is as large as that


def test_results_carry_the_ids_of_the_file(tmp_path):
    data = CocoImages(*write_coco(tmp_path, category_ids=(7, 40, 900)), unchanged)
    assert {r["category_id"] for r in perfect_results(data)} <= {7, 40, 900}
    found = Detections(torch.tensor([[1.0, 2, 4, 8]]), torch.tensor([0.5]), torch.tensor([2]))
    (result,) = to_results(found, 17, data.category_ids)
    assert result == {"image_id": 17, "category_id": 900, "bbox": [1, 2, 3, 6], "score": 0.5}


def test_wrong_classes_and_shifted_boxes_score_less(tmp_path):
    data = CocoImages(*write_coco(tmp_path), unchanged)
    wrong = [r | {"category_id": r["category_id"] % 3 + 1} for r in perfect_results(data)]
    assert evaluate(data.data, wrong)["AP"] == pytest.approx(0)
    shifted = [r | {"bbox": [r["bbox"][0] + 3, *r["bbox"][1:]]} for r in perfect_results(data)]
    metrics = evaluate(data.data, shifted)
    assert 0 < metrics["AP"] < metrics["AP50"] == pytest.approx(1)


def test_nothing_found(tmp_path):
    data = CocoImages(*write_coco(tmp_path), unchanged)
    metrics = evaluate(data.data, [])
    assert set(metrics) == {*_METRICS, "AP-red", "AP-green", "AP-blue"}
    assert not any(metrics.values())


def test_classes_without_objects_have_no_precision(tmp_path):
    files = write_coco(tmp_path)
    files.change(lambda content: content["categories"].append({"id": 8, "name": "unseen"}))
    data = CocoImages(*files, unchanged)
    assert evaluate(data.data, perfect_results(data))["AP-unseen"] == -1


def test_the_evaluation_is_silent(tmp_path, capsys):
    data = CocoImages(*write_coco(tmp_path), unchanged)
    evaluate(data.data, perfect_results(data))
    assert capsys.readouterr().out == ""


def test_what_evaluation_needs_is_filled_in():
    """Copies: the annotations of the file stay as they are."""
    bare = [{"id": 0, "bbox": [1, 2, 3, 4]}, {"id": 9, "bbox": [0, 0, 2, 2], "area": 3.5, "iscrowd": 1}]
    before = [dict(a) for a in bare]
    assert complete_annotations(bare) == [
        {"id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "bbox": [0, 0, 2, 2], "area": 3.5, "iscrowd": 1},
    ]
    assert bare == before


def crossed(random, data, per_object=4):
    """Detections around every object with scores that do not follow the overlap, some of another class."""
    ids = [c["id"] for c in data["categories"]]
    results = []
    for a in data["annotations"]:
        for _ in range(per_object):
            x, y, w, h = a["bbox"]
            box = [x + random.normal(0, 0.1) * w, y + random.normal(0, 0.1) * h, w, h]
            category = a["category_id"] if random.random() < 0.8 else int(random.choice(ids))
            score = float(random.random())
            results.append({"image_id": a["image_id"], "category_id": category, "bbox": box, "score": score})
    return results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("crowd", [False, True])
def test_precision_without_detections_is_that_of_results_which_lack_them(tmp_path, seed, crowd):
    random = np.random.default_rng(seed)
    data = write_coco(tmp_path, counts=(5, 3, 0, 6), seed=seed).read()
    data["annotations"][0]["iscrowd"] = int(crowd)
    results = crossed(random, data)
    coco_eval = run_coco(data, results)
    before = precision_of(coco_eval).copy()
    dropped = {int(n) for n in random.choice(len(results), len(results) // 3, replace=False) + 1}
    expected = precision_of(run_coco(data, [r for n, r in enumerate(results, 1) if n not in dropped]))
    found = precision_without(coco_eval, dropped)
    assert found.shape == (10, 101, 3, 1)
    np.testing.assert_array_equal(found[..., 0], expected[..., 0])
    assert summarise(found) == {name: summarise(expected)[name] for name in ("AP", "AP50", "AP75")}
    np.testing.assert_array_equal(precision_of(coco_eval), before)
    everything = precision_without(coco_eval, set(range(1, len(results) + 1)))
    assert set(np.unique(everything)) <= {-1, 0}


def crowded(random):
    """Objects and detections that overlap, with equal scores and equal overlaps, crowd regions and all sizes."""
    base = random.integers(1, 30, (8, 4)) * [4, 4, 1, 1] * random.choice([1, 1, 4], (8, 1))

    def boxes(most):
        chosen = base[random.integers(0, 8, random.integers(0, most))]
        return (chosen + random.integers(0, 3, chosen.shape) * (random.random((len(chosen), 1)) < 0.5)).tolist()

    def place():
        return {"image_id": int(random.integers(3)), "category_id": int(random.integers(1, 3))}

    annotations = [{"bbox": box, "iscrowd": int(random.random() < 0.2), **place()} for box in boxes(30)]
    results = [{"bbox": box, "score": float(random.integers(5)) / 5, **place()} for box in boxes(50)]
    images = [{"id": n, "file_name": f"{n}.png", "width": 300, "height": 300} for n in range(3)]
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def test_matching_at_once_equals_that_of_pycocotools(monkeypatch):
    random = np.random.default_rng(0)
    for _ in range(40):
        data, results = crowded(random)
        ours = run_coco(data, results)
        with monkeypatch.context() as patch:
            patch.setattr(average_precision, "_FastEval", COCOeval)
            theirs = run_coco(data, results)
        for mine, reference in zip(ours.evalImgs, theirs.evalImgs, strict=True):
            assert (mine is None) == (reference is None)
            for key, value in (reference or {}).items():
                np.testing.assert_array_equal(mine[key], value, err_msg=key)
        np.testing.assert_array_equal(ours.eval["precision"], theirs.eval["precision"])


def test_a_picture_with_thousands_of_equal_objects():
    """Pycocotools alone compares every pair in Python, for each threshold and size: two minutes."""
    box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "one"}],
        "annotations": [box] * 20_000,
    }
    coco_eval = run_coco(data, [{**box, "score": 0.5}] * 20_000)
    cell = coco_eval.evalImgs[0]
    assert len(set(cell["dtMatches"][0])) == 100  # COCO looks at 100 detections; each has an object of its own
    assert (cell["gtMatches"] > 0).sum() == 10 * 100
