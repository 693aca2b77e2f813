"""Likely label errors, with detections that are made by hand or from the truth."""

import json

import numpy as np
import pytest

from dino.evaluation.label_errors import KINDS, find_label_errors

from ..tools.programs import load_program

benchmark = load_program("label_errors", folder="benchmarks")
BOXES = [[10 + 60 * column, 10 + 60 * row, 40, 40] for row in range(3) for column in range(4)]


def scene(boxes=BOXES, images=1):
    """Annotations of classes 2 and 5 in turn, and detections that fit them, 2 pixels to the right."""
    entries = [{"id": n, "file_name": f"{n}.png", "width": 460, "height": 300} for n in range(1, images + 1)]
    annotations, results = [], []
    for image in entries:
        for n, (x, y, w, h) in enumerate(boxes):
            place = {"image_id": image["id"], "category_id": (2, 5)[n % 2]}
            annotations.append({**place, "id": len(annotations) + 1, "bbox": [x, y, w, h], "iscrowd": 0})
            results.append({**place, "bbox": [x + 2, y, w, h], "score": 0.9})
    categories = [{"id": 2, "name": "circle"}, {"id": 5, "name": "square"}]
    return {"images": entries, "annotations": annotations, "categories": categories}, results


def test_nothing_to_doubt():
    assert find_label_errors(*scene()) == []


def test_no_annotations_and_no_detections():
    data, results = scene()
    assert find_label_errors({**data, "annotations": []}, []) == []
    assert find_label_errors(data, []) == []  # what the model never finds is no reason to doubt
    assert {e.kind for e in find_label_errors({**data, "annotations": []}, results)} == {"missing"}


def test_a_missing_object_is_proposed_once():
    data, results = scene()
    gone = data["annotations"].pop(3)
    x, y, w, h = gone["bbox"]
    results.append({**results[3], "category_id": 2, "score": 0.6})  # another class, on the same object
    results.append({**results[3], "bbox": [x - 12, y, w, h], "score": 0.5})  # a second box
    (error,) = find_label_errors(data, results)
    assert error.kind == "missing"
    assert (error.category_id, error.box, error.score, error.annotation) == (5, results[3]["bbox"], 0.9, None)


def test_a_second_detection_of_an_annotated_object_is_no_missing_one():
    data, results = scene()
    results.append({**results[3], "bbox": [results[3]["bbox"][0] + 8, *results[3]["bbox"][1:]], "score": 0.85})
    assert find_label_errors(data, results) == []


def test_nothing_is_missing_in_a_crowd_region():
    data, results = scene()
    data["annotations"][3]["iscrowd"] = 1
    assert find_label_errors(data, results) == []


def test_another_class():
    data, results = scene()
    data["annotations"][4]["category_id"] = 5
    results.append({**results[4], "category_id": 5, "score": 0.2})
    (error,) = find_label_errors(data, results)
    assert error.kind == "class"
    assert error.score == pytest.approx(0.9 - 0.2)
    assert (error.category_id, error.annotation["id"]) == (2, 5)
    assert error.box == data["annotations"][4]["bbox"]


@pytest.mark.parametrize("step", [12, 20, 28])
def test_a_shifted_box(step):
    data, results = scene(images=6)
    data["annotations"][5]["bbox"][0] += step
    (error,) = find_label_errors(data, results)
    assert error.kind == "box"
    assert (error.annotation["id"], error.box) == (6, results[5]["bbox"])


def test_a_larger_shift_is_a_likelier_error():
    data, results = scene(images=6)
    for index, step in ((7, 15), (30, 25)):
        data["annotations"][index]["bbox"][0] += step
    assert [e.annotation["id"] for e in find_label_errors(data, results)] == [31, 8]


def test_a_model_that_places_boxes_badly_doubts_no_box():
    data, results = scene(images=6)
    for found in results:
        found["bbox"] = [found["bbox"][0] + 14, *found["bbox"][1:]]
    assert find_label_errors(data, results) == []


def test_an_annotation_of_nothing():
    data, results = scene(images=6)
    results.pop(8)
    results[20]["score"] = 0.3
    first, second = find_label_errors(data, results)
    assert (first.kind, first.annotation["id"], first.score) == ("spurious", 9, pytest.approx(0.9))
    assert (second.kind, second.annotation["id"], second.score) == ("spurious", 22, pytest.approx(0.3))


def test_small_objects_that_the_model_seldom_finds_are_not_doubted():
    data, results = scene([*BOXES, *([x + 45, y + 45, 6, 6] for x, y, _, _ in BOXES)], images=10)
    results = [r for r in results if r["bbox"][2] > 6]
    assert find_label_errors(data, results) == []


def test_classes_that_the_model_lacks_are_not_judged():
    data, results = scene(images=2)
    results = [r for r in results if r["category_id"] == 2]
    results.append({**results[0], "bbox": data["annotations"][1]["bbox"]})  # on an object of the other class
    assert find_label_errors(data, results, known={2}) == []


@pytest.mark.parametrize("box", [[5, 5, 0, 9], [5, 5, -3, 9], [5, float("nan"), 3, 9]])
def test_boxes_without_size_are_left_out(box):
    data, results = scene()
    data["annotations"].append({"id": 99, "image_id": 1, "category_id": 2, "bbox": box})
    results.append({"image_id": 1, "category_id": 2, "bbox": box, "score": 0.9})
    assert find_label_errors(data, results) == []


def simulate(truth, seed):
    """Detections of a middling model: 5 % missed, boxes and scores noisy, some confusion, some false ones."""
    random, results = np.random.default_rng(seed), []
    ids = [c["id"] for c in truth["categories"]]
    for a in truth["annotations"]:
        if random.random() < 0.05:
            continue
        sides = np.array([*a["bbox"][2:]] * 2)
        box = (np.array(a["bbox"]) + random.normal(0, 0.04, 4) * sides).tolist()
        place = {"image_id": a["image_id"], "bbox": box}
        results.append({**place, "category_id": a["category_id"], "score": float(random.beta(6, 3))})
        results.append({**place, "category_id": int(random.choice(ids)), "score": float(random.beta(1, 8))})
    for image in truth["images"]:
        place = {"image_id": image["id"], "bbox": [*random.uniform(0, 150, 2).tolist(), 30.0, 30.0]}
        results.append({**place, "category_id": int(random.choice(ids)), "score": float(random.beta(1, 6))})
    return results


@pytest.mark.parametrize("seed", range(3))
def test_planted_errors_are_among_the_first(seed):
    truth, _ = scene(images=60)
    before = json.dumps(truth)
    data, planted = benchmark.plant(truth, seed)
    assert json.dumps(truth) == before
    assert {kind: len(found) for kind, found in planted.items()} == {
        "missing": 72,
        "box": 36,
        "class": 36,
        "spurious": 36,
    }
    errors = find_label_errors(data, simulate(truth, seed))
    assert [e.score for e in errors] == sorted((e.score for e in errors), reverse=True)
    doubted = [e.annotation["id"] for e in errors if e.annotation]
    assert len(doubted) == len(set(doubted))
    figures = benchmark.judge(planted, errors)
    assert set(figures) == set(KINDS)
    assert min(row["found_in_first_2n"] for row in figures.values()) >= 0.8, figures


def test_many_boxes_in_one_picture():
    random = np.random.default_rng(0)
    boxes = np.concatenate([random.uniform(0, 9000, (20000, 2)), np.full((20000, 2), 10.0)], 1).tolist()
    data, results = scene(boxes)
    assert all(0.1 <= e.score <= 1 for e in find_label_errors(data, results))
