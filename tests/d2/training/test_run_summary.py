import logging
import re

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.config import instantiate

from dino.d2 import recipe
from dino.d2.data_loading import ShortSide, load_dataset
from dino.d2.training import engine, run_summary
from dino.training import plan_summary
from dino.utils.files import DataError

from ...coco_files import CocoFiles
from ..recipes import file_arguments as files
from ..recipes import load_recipe, tiny_recipe, write_two_sets

BATCH = "dataloader.train.total_batch_size"


def summarise(cfg):
    data = [instantiate(cfg.dataloader[key].dataset) for key in ("train", "test")]
    return run_summary.summarise_data(cfg, *data).doubts


def edit(split, folder, **values):
    """Change all objects of a written data set that the catalog knows already."""
    CocoFiles(str(folder / split / "annotations.json"), "").change(
        lambda content: [a.update(values) for a in content["annotations"]]
    )
    load_dataset.cache_clear()


def test_the_data_are_summarised(tmp_path, caplog):
    cfg = tiny_recipe(tmp_path, "model.network.query_selection.num_queries=2", counts=(3, 0, 1))
    cfg.model.network.denoising.num_denoising = 1
    with caplog.at_level(logging.INFO):
        summarise(cfg)
    text = caplog.text
    assert "3 training images, 1 of them without objects; 4 objects of 3 classes" in text
    for limit in ("2 queries", "1 denoising queries"):
        assert f"image_1.png has 3 objects, more than the {limit} per image" in text
    assert "detections" not in text
    assert "size of objects after the evaluation's resize, square root of the area in pixels: 5% below" in text


def test_data_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="the training data has no images"):
        run_summary.summarise_data(tiny_recipe(tmp_path), [], [])


def test_sizes_follow_the_resize():
    images = [{"height": 100, "width": 200, "annotations": [{"bbox": [0, 0, 10, 40]}]}]
    assert run_summary._sizes_after_resize(images, []) == pytest.approx([20])
    assert run_summary._sizes_after_resize(images, [ShortSide([50])]) == pytest.approx([10])
    assert run_summary._sizes_after_resize([{**images[0], "annotations": []}], [ShortSide([50])]).shape == (0,)


def test_tiny_objects_are_warned_of(tmp_path, caplog, monkeypatch):
    cfg = tiny_recipe(tmp_path)
    monkeypatch.setattr(run_summary, "_sizes_after_resize", lambda *_: np.array([3.0, 5.0, 100.0]))
    doubts = summarise(cfg)
    assert "half of the objects are smaller than 8 pixels" in caplog.text
    assert doubts == ["half of the objects are smaller than 8 pixels: try larger images or tiles"]


def test_boxes_as_large_as_their_images_are_warned_of(tmp_path, caplog):
    cfg = tiny_recipe(tmp_path)
    edit("train", tmp_path, bbox=[0, 0, 72, 64])
    (doubt,) = summarise(cfg)
    assert doubt.startswith("half of the training boxes cover more than 90% of their image")
    assert doubt in caplog.text


def test_training_data_without_objects_are_refused(tmp_path):
    cfg = tiny_recipe(tmp_path)
    edit("train", tmp_path, iscrowd=1)
    path = re.escape(str(tmp_path / "train/annotations.json"))
    numbers = r"4 images, 6 annotations, 6 of them crowd regions \(iscrowd=1\), 0 boxes without area"
    with pytest.raises(DataError, match=f"^nothing to learn: {path} has no objects: {numbers}"):
        engine.train(cfg, resume=False)
    assert not list((tmp_path / "run").iterdir())


def test_validation_data_without_objects_are_warned_of(tmp_path, caplog):
    cfg = tiny_recipe(tmp_path)
    edit("val", tmp_path, iscrowd=1)
    summarise(cfg)
    expected = f"AP will be undefined, and there will be no model_best.pth: {tmp_path / 'val/annotations.json'} has no"
    assert expected in caplog.text
    cfg.train.best.patience = 2
    with pytest.raises(DataError, match=r"train\.best\.patience=2 needs an AP, but .*6 of them crowd regions"):
        summarise(cfg)


def test_the_plan_is_told_with_all_that_repeating_it_needs(tmp_path, caplog):
    cfg = tiny_recipe(tmp_path, "train.max_iter=1", "train.eval_period=0", "train.seed=5")
    with caplog.at_level(logging.INFO):
        engine.train(cfg, resume=False)
    for words in ("batch: 2 images = 1 processes x 1 parts x 2 images", "learning rates: 2.00e-04 for", "seed: 5"):
        assert words in caplog.text
    for words in ("precision: float32", "parameters: ", "deform_attn:", "commit: ", "data: ", "torch: "):
        assert words in caplog.text
    about = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["about"]
    assert about["seed"] == 5
    assert {"commit", "data", "torch", "dino"} <= about.keys()
    assert about["recipe"] == (tmp_path / "run/config.yaml").read_text()


def test_the_fingerprint_is_of_the_data_wherever_they_lie():
    entry = {"file_name": "a/x.png", "height": 2, "width": 3, "annotations": [{"bbox": [0, 0, 1, 1], "category_id": 0}]}
    same = {**entry, "file_name": "b/x.png"}
    other = {**entry, "annotations": [{"bbox": [0, 0, 1, 1], "category_id": 1}]}
    assert plan_summary._fingerprint([entry]) == plan_summary._fingerprint([same])
    assert plan_summary._fingerprint([entry]) != plan_summary._fingerprint([other])
    assert len(plan_summary._fingerprint([])) == 16


def scaled(folder, *overrides):
    cfg = load_recipe(*files(*write_two_sets(folder)), *overrides)
    recipe.scale_to_batch(cfg, overrides)
    return cfg


def test_the_learning_rate_follows_the_batch(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        cfg = scaled(tmp_path, f"{BATCH}=16")
    assert cfg.optimizer.lr == pytest.approx(8 * 4e-4)  # of the small recipe, for 2 images
    assert "total batch 16, the recipe's is 2: optimizer.lr 4.00e-04 -> 3.20e-03" in caplog.text
    recipe.scale_to_batch(cfg, [])  # the saved recipe is scaled already
    assert cfg.optimizer.lr == pytest.approx(8 * 4e-4)


def test_what_is_stated_is_taken_as_it_stands(tmp_path):
    cfg = scaled(tmp_path, f"{BATCH}=8", "optimizer.lr=0.5", "train.max_iter=100")
    assert (cfg.optimizer.lr, cfg.train.max_iter) == (0.5, 100)
    assert scaled(tmp_path, f"{BATCH}=8", "train.reference_batch=8").optimizer.lr == 4e-4
    assert scaled(tmp_path).optimizer.lr == 4e-4


def test_iterations_of_a_recipe_follow_the_batch(tmp_path):
    overrides = [f"{BATCH}=4"]
    cfg = load_recipe(*files(*write_two_sets(tmp_path)), *overrides)
    cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period = 1000, 0, 50
    recipe.scale_to_batch(cfg, overrides)
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (500, 0, 25)
