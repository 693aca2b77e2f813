import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import GeneralizedRCNNWithTTA

from dino.d2.augmented_detector import AugmentedDetector
from dino.d2.meta_arch import DINODetector
from dino.d2.training import engine
from dino.inference.tta import Augmentation, join
from dino.layers import Detections

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


def assert_same(found, expected):
    found, expected = found["instances"], expected["instances"]
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3)
    assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("sizes", [[64], [64, 64, 64]])
def test_views_of_the_same_size_change_nothing(network, sizes):
    image = random_input("a.png", height=64, width=80)
    (expected,) = plain(network)([image])
    (found,) = augmented(network, sizes=sizes, flips=[False])([image])
    assert_same(found, expected)


def test_the_first_size_is_the_main_view(network):
    image = random_input("a.png", height=64, width=80)
    (expected,) = plain(network)([image])
    (found,) = augmented(network, sizes=[64, 48], overlap=1.0)([image])  # no match
    assert_same(found, expected)
    (found,) = augmented(network, sizes=[64, 48], overlap=0.2)([image])
    scores = found["instances"].scores
    assert torch.equal(scores, scores.sort(descending=True).values)
    assert len(scores) == 20  # as many as of one view
    moved = (found["instances"].pred_boxes.tensor - expected["instances"].pred_boxes.tensor).abs().amax(1) > 0.01
    assert moved.any()
    assert torch.equal(found["instances"].pred_classes, expected["instances"].pred_classes)


def test_views_come_back_to_the_picture(network):
    """A picture of twice the size: boxes of the image and of the mirrored image, doubled, as an average by weights."""
    image = random_input("a.png", height=64, width=80)
    mirrored = {**image, "image": image["image"].flip(-1)}
    detector = augmented(network, sizes=[64], flips=[True], overlap=0.2, weights=[1.0, 3.0])
    (found,) = detector([{**image, "height": 128, "width": 160}])
    one, other = (plain(network)([x])[0]["instances"] for x in (image, mirrored))
    x0, y0, x1, y1 = other.pred_boxes.tensor.unbind(-1)
    boxes = one.pred_boxes.tensor * 2, torch.stack([80 - x1, y0, 80 - x0, y1], -1) * 2
    views = [Detections(b, of.scores, of.pred_classes) for b, of in zip(boxes, (one, other), strict=True)]
    expected = join(views, [Augmentation((64, 80), False)] * 2, [1.0, 3.0], 160, 0.2)
    assert (expected.boxes - boxes[0]).abs().max() > 0.5  # some are matched
    torch.testing.assert_close(found["instances"].pred_boxes.tensor, expected.boxes, rtol=0, atol=1e-2)
    torch.testing.assert_close(found["instances"].scores, one.scores)
    assert found["instances"].image_size == (128, 160)


@pytest.mark.parametrize("weights", [[1.0], [1.0] * 3, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, float("nan")]])
def test_every_view_has_a_positive_weight(network, weights):
    with pytest.raises(ValueError, match="weights must be 4 positive numbers"):
        augmented(network, sizes=[48, 64], weights=weights)


def test_as_an_option_of_the_evaluation(tmp_path):
    """Weights of a plain detector, evaluated by the command line's override."""
    cfg = tiny_recipe(tmp_path)
    weights = tmp_path / "weights.pth"
    torch.save({"model": instantiate(cfg.model).state_dict(), "names": ["red", "green", "blue"]}, weights)
    cfg.train.init_checkpoint = str(weights)
    cfg.model._target_ = "dino.d2.augmented_detector.AugmentedDetector"
    cfg.model.sizes = [48, 64]
    cfg.model.weights = [2.0, 2.0, 1.0, 1.0]
    cfg.dataloader.test.mapper.augmentations = []
    assert 0 <= engine.evaluate_checkpoint(cfg)["bbox"]["AP"] <= 100


def test_what_a_user_of_detectron2s_augmentation_does(network):
    """The arguments of `GeneralizedRCNNWithTTA`, which takes R-CNNs only."""
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = 64, (48, 64, 96), 200
    model, image = plain(network), random_input("a.png", height=64, width=80)
    with pytest.raises(AssertionError, match="only supported on GeneralizedRCNN"):
        GeneralizedRCNNWithTTA(cfg, model)
    found = AugmentedDetector.from_model(cfg, model)
    assert (found.sizes, found.max_size, found.flips) == ([64, 48, 96], 200, [False, True])
    assert found.network is network
    assert_same(found([image])[0], augmented(network, sizes=[64, 48, 96], max_size=200)([image])[0])
    cfg.TEST.AUG.FLIP = False
    assert AugmentedDetector.from_model(cfg, model).flips == [False]


def test_settings_of_the_model_stay(network):
    model = plain(network)
    model.score_thresh, model.max_detections = 0.25, 7
    made = AugmentedDetector.from_model(get_cfg(), model)
    assert (made.score_thresh, made.max_detections, made.num_classes) == (0.25, 7, 3)
    assert torch.equal(made.pixel_mean, model.pixel_mean)
    assert not made.training
