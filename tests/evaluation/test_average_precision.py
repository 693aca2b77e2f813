import numpy as np
import pytest
import torch

from dino.data.coco import CocoImages
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
