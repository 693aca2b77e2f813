import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import instantiate
from torchvision.ops import box_iou

from dino.d2.augmented_detector import AugmentedDetector
from dino.d2.meta_arch import DINODetector
from dino.d2.training import engine

from ..tiny import default_criterion, tiny_network
from .recipes import tiny_recipe
from .tiny import random_input, stirred


def augmented(network, **changes):
    parts = {"network": network, "criterion": default_criterion(), "num_classes": 3, "max_detections": 20}
    return AugmentedDetector(**parts, **changes).eval()


def plain(network):
    return DINODetector(network=network, criterion=default_criterion(), num_classes=3, max_detections=20).eval()


@pytest.fixture
def network():
    return stirred(tiny_network())


def test_one_view_of_the_same_size_changes_nothing(network):
    image = random_input("a.png", height=64, width=80)
    (expected,) = plain(network)([image])
    (found,) = augmented(network, sizes=[64], flips=[False], overlap=1.0)([image])
    expected, found = expected["instances"], found["instances"]
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3)
    assert torch.equal(found.pred_classes, expected.pred_classes)


def test_views_come_back_to_the_picture(network):
    """A picture of twice the size: boxes of the image, and those of the mirrored image mirrored, both doubled."""
    image = random_input("a.png", height=64, width=80)
    mirrored = {**image, "image": image["image"].flip(-1)}
    detector = augmented(network, sizes=[64], flips=[True], overlap=1.0)
    (found,) = detector([{**image, "height": 128, "width": 160}])
    one, other = (plain(network)([x])[0]["instances"] for x in (image, mirrored))
    x0, y0, x1, y1 = other.pred_boxes.tensor.unbind(-1)
    boxes = torch.cat([one.pred_boxes.tensor, torch.stack([80 - x1, y0, 80 - x0, y1], -1)]) * 2
    best = torch.cat([one.scores, other.scores]).argsort(descending=True)[: len(found["instances"])]
    torch.testing.assert_close(found["instances"].pred_boxes.tensor, boxes[best], rtol=0, atol=1e-2)
    assert found["instances"].image_size == (128, 160)


def test_what_views_agree_on_is_said_once(network):
    image = random_input("a.png", height=64, width=80)
    detector = augmented(network, sizes=[64, 64, 64], flips=[False], overlap=0.99)
    (found,) = detector([image])
    (once,) = augmented(network, sizes=[64], flips=[False], overlap=0.99)([image])
    torch.testing.assert_close(found["instances"].scores, once["instances"].scores)
    (found,) = augmented(network, sizes=[48, 64], overlap=0.0)([image])
    boxes, classes = found["instances"].pred_boxes.tensor, found["instances"].pred_classes
    same = (classes[:, None] == classes) & ~torch.eye(len(classes), dtype=torch.bool)
    assert len(classes) > 1
    assert box_iou(boxes, boxes)[same].sum() == 0  # nothing of one class touches
    scores = found["instances"].scores
    assert torch.equal(scores, scores.sort(descending=True).values)


def test_as_an_option_of_the_evaluation(tmp_path):
    """Weights of a plain detector, evaluated by the command line's override."""
    cfg = tiny_recipe(tmp_path)
    weights = tmp_path / "weights.pth"
    torch.save({"model": instantiate(cfg.model).state_dict(), "names": ["red", "green", "blue"]}, weights)
    cfg.train.init_checkpoint = str(weights)
    cfg.model._target_ = "dino.d2.augmented_detector.AugmentedDetector"
    cfg.model.sizes = [48, 64]
    cfg.dataloader.test.mapper.augmentations = []
    assert 0 <= engine.evaluate_checkpoint(cfg)["bbox"]["AP"] <= 100
