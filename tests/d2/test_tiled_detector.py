import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import instantiate

from dino.d2.meta_arch import DINODetector
from dino.d2.tiled_detector import TiledDetector
from dino.d2.training import engine
from dino.modeling import CudaGraphs, detector
from dino.training import gpu_speed

from ..modeling.test_cuda_graphs import FakeRecorder
from ..tiny import default_criterion, tiny_network
from .recipes import tiny_recipe
from .tiny import random_input, stirred

PARTS = {"criterion": default_criterion(), "num_classes": 3, "max_detections": 20}


def tiled(network, **changes):
    return TiledDetector(network=network, **PARTS, **{"short_side": 64, "max_size": 128, **changes}).eval()


def test_a_small_picture_is_seen_as_by_the_plain_detector():
    network = stirred(tiny_network())
    image = {**random_input("a.png", height=64, width=80), "height": 128, "width": 160}
    (expected,) = DINODetector(network=network, **PARTS).eval()([image])
    (found,) = tiled(network)([image])
    expected, found = expected["instances"], found["instances"]
    assert found.image_size == (128, 160)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-2)
    assert torch.equal(found.pred_classes, expected.pred_classes)


def test_a_large_picture_is_seen_in_tiles():
    detector, sizes = tiled(stirred(tiny_network()), tile=64, overlap=0.25), []
    detector.network.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    (found,) = detector([random_input("a.png", height=64, width=150)])
    assert sizes == [(1, 3, 55, 128)] + [(1, 3, 64, 64)] * 3  # the whole, and three tiles
    assert 0 < len(found["instances"]) <= 20


def test_tiles_are_replayed_where_the_recipe_wants_graphs(monkeypatch):
    recorder = FakeRecorder()
    monkeypatch.setattr(detector, "CudaGraphs", lambda network, most: CudaGraphs(network, most=most, recorder=recorder))
    model, image = tiled(stirred(tiny_network())), random_input("a.png", height=64, width=80)
    assert model.predictor.detector.graphs is None
    with gpu_speed.replayed(model, 2):
        for _ in range(2):
            model([image])
    assert (recorder.recorded, recorder.replayed) == (1, 1)
    assert model.predictor.detector.graphs is None


def test_training_and_evaluation_by_the_recipe(tmp_path):
    cfg = tiny_recipe(tmp_path)
    cfg.model._target_ = "dino.d2.tiled_detector.TiledDetector"
    for key, value in {"tile": 48, "short_side": 48, "max_size": 96}.items():
        cfg.model[key] = value
    cfg.dataloader.test.mapper.augmentations = []
    model = instantiate(cfg.model)
    assert set(model.state_dict()) == set(instantiate(tiny_recipe(tmp_path).model).state_dict())
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    cfg.train.init_checkpoint = str(tmp_path / "weights.pth")
    assert 0 <= engine.evaluate_checkpoint(cfg)["bbox"]["AP"] <= 100
