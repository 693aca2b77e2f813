"""What a `Predictor` returns, and its ways into other programs."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import dino
from dino import structures
from dino.evaluation.average_precision import to_results
from dino.inference.predictor import Detections, Prediction
from dino.utils.files import UserError


def found(count=3, **options):
    boxes = torch.tensor([[20.0, 30, 80, 90], [-5, -5, 30, 20], [100, 60, 170, 130.5]])[:count]
    scores, labels = torch.tensor([0.9, 0.8, 0.3])[:count], torch.tensor([0, 2, 0])[:count]
    names = ["cat", "dog \x1b[31m", "cat"][:count]
    pixels = np.full((120, 160, 3), 128, np.uint8)
    return Detections(structures.Detections(boxes, scores, labels), names, (120, 160), pixels, **options)


def test_one_class_under_all_its_names():
    assert dino.Detections is Detections is Prediction


def test_some_of_the_objects():
    every = found()
    for chosen in (every.scores > 0.7, [True, True, False], np.array([0, 1]), slice(2), [0, 1]):
        some = every[chosen]
        assert some.names == every.names[:2]
        assert torch.equal(some.boxes, every.boxes[:2])
        assert some.image_size == every.image_size
        assert some.source is every.source
    assert every[every.scores > 2].names == []
    assert [one.names for one in every] == [["cat"], ["dog \x1b[31m"], ["cat"]]
    with pytest.raises(IndexError):
        every[3]


def test_as_text():
    assert repr(found()) == r"<Detections: 3: cat 0.90, dog \x1b[31m 0.80, cat 0.30>"
    assert repr(found(0)) == "<Detections: 0>"


def test_coco():
    ids = [7, 1, 42]
    entries = found(category_ids=ids).to_coco(image_id=5)
    assert entries == to_results(found().detections, 5, ids)
    assert entries[1] == {"image_id": 5, "category_id": 42, "bbox": [-5, -5, 35, 25], "score": pytest.approx(0.8)}
    assert {type(value) for value in entries[0]["bbox"]} == {float}
    assert [entry["category_id"] for entry in found().to_coco(image_id=5)] == [1, 3, 1]
    assert found(0).to_coco(image_id=5) == []


def test_clipped():
    every = found()
    inside = every.clip()
    assert (every.clipped, inside.clipped, inside[:1].clipped, inside.clip().clipped) == (False, True, True, True)
    assert inside.boxes.tolist() == [[20, 30, 80, 90], [0, 0, 30, 20], [100, 60, 160, 120]]
    assert every.boxes[1].tolist() == [-5, -5, 30, 20]
    assert torch.equal(inside.clip().boxes, inside.boxes)
    assert inside.names == every.names
    assert inside.to_coco(image_id=5)[1]["bbox"] == [0, 0, 30, 20]
    assert len(found(0).clip()) == 0


def test_boxes_that_are_empty_after_clipping_are_dropped():
    boxes = torch.tensor([[-9.0, 5, 0, 9], [5, 5, 5, 9], [1, 1, 2, 2], [170, 5, 180, 9], [5, 4, 9, 4]])
    values = structures.Detections(boxes, torch.linspace(0.9, 0.5, 5), torch.arange(5))
    every = Detections(values, list("abcde"), (120, 160), None)
    assert every.clip().names == ["c"]
    assert every.clip().labels.tolist() == [2]


def check_supervision(given, count):
    assert given.xyxy.shape == (count, 4)
    assert given.confidence.shape == given.class_id.shape == given.data["class_name"].shape == (count,)
    assert given.class_id.dtype == np.int64
    assert given.data["class_name"].dtype.kind == "U"


@pytest.mark.parametrize("count", [0, 3])
def test_supervision(monkeypatch, count):
    """By a stand-in of the same arguments."""

    class Stand:
        def __init__(self, xyxy, mask=None, confidence=None, class_id=None, tracker_id=None, data=None):
            self.xyxy, self.confidence, self.class_id, self.data = xyxy, confidence, class_id, data

    module = ModuleType("supervision")
    module.Detections = Stand
    monkeypatch.setitem(sys.modules, "supervision", module)
    every = found(count)
    given = every.to_supervision()
    check_supervision(given, count)
    assert np.array_equal(given.xyxy, every.boxes.numpy())
    given.xyxy[:] = 0  # a copy
    assert not count or every.boxes[0, 0] == 20


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 3])
def test_the_true_supervision(count):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    given = found(count).to_supervision()
    assert isinstance(given, supervision.Detections)
    check_supervision(given, count)
    assert len(given[given.confidence > 0.5]) == min(count, 2)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install 'dino-detectron2\[supervision\]'"):
        found().to_supervision()
    monkeypatch.setitem(sys.modules, "dino.d2.instances_predictor", None)
    with pytest.raises(UserError, match=r"to_instances needs Detectron2: README\.md says how"):
        found().to_instances()


def test_instances():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.structures import Boxes, Instances

    every = found()
    instances = every.to_instances()
    assert isinstance(instances, Instances)
    assert isinstance(instances.pred_boxes, Boxes)
    assert instances.image_size == (120, 160)
    assert torch.equal(instances.pred_boxes.tensor, every.clip().boxes)
    assert not torch.equal(instances.pred_boxes.tensor, every.boxes)
    assert torch.equal(instances.scores, every.scores)
    assert torch.equal(instances.pred_classes, every.labels)
    assert len(found(0).to_instances()) == 0
