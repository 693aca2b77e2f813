import numpy as np
import pytest
import torch
from PIL import Image

from dino.inference.palette import colour_of
from dino.structures import Detections
from dino.training import run_pictures
from dino.training.run_pictures import NEGATIVE, POSITIVE, draw_train_batch, draw_val_predictions

NAMES = [f"name {k}" for k in range(60)]


def batch(count, objects=3, height=60, width=80):
    """-> grey images, boxes, labels."""
    images = [torch.full((3, height, width), 128, dtype=torch.uint8) for _ in range(count)]
    boxes = [torch.tensor([[8.0 + 20 * k, 10.0, 24.0 + 20 * k, 50.0] for k in range(objects)]).reshape(-1, 4)] * count
    return images, boxes, [torch.arange(objects)] * count


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count_of(pixels, colour):
    return int((pixels == colour).all(-1).sum())


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
def test_a_batch_of_any_size(tmp_path, count):
    draw_train_batch(tmp_path / "batch.png", *batch(count), NAMES)
    pixels = read(tmp_path / "batch.png")
    assert pixels.shape[1] <= 1700
    assert all(count_of(pixels, colour_of(label)) for label in range(3))
    assert not list(tmp_path.glob("*.part"))


def test_an_empty_batch_and_images_without_objects(tmp_path):
    draw_train_batch(tmp_path / "none.png", [], [], [], NAMES)
    assert not (tmp_path / "none.png").exists()
    draw_train_batch(tmp_path / "empty.png", *batch(2, objects=0), NAMES)
    assert (tmp_path / "empty.png").is_file()


def test_images_of_extreme_shapes(tmp_path):
    images = [torch.zeros(3, *shape, dtype=torch.uint8) for shape in ((1, 1), (2, 900), (3000, 40))]
    boxes, labels = [torch.zeros(0, 4)] * 3, [torch.zeros(0, dtype=torch.int64)] * 3
    draw_train_batch(tmp_path / "batch.png", images, boxes, labels, NAMES)
    assert (tmp_path / "batch.png").is_file()


def test_denoising_queries_have_a_panel_and_colours_of_their_own(tmp_path):
    images, boxes, labels = batch(2)
    queries = [{POSITIVE: x + 2, NEGATIVE: x - 4} for x in boxes]
    draw_train_batch(tmp_path / "batch.png", images, boxes, labels, NAMES, queries)
    pixels = read(tmp_path / "batch.png")
    quarter = pixels.shape[1] // 4
    without_legend = pixels[:-60]
    assert count_of(without_legend[:, quarter : 2 * quarter], POSITIVE) > 50
    assert count_of(without_legend[:, quarter : 2 * quarter], NEGATIVE) > 50
    assert not count_of(without_legend[:, :quarter], POSITIVE)
    assert count_of(without_legend[:, :quarter], colour_of(0)) > 50


def test_true_boxes_stand_beside_predicted_ones(tmp_path):
    images, boxes, labels = batch(1)
    found = Detections(boxes[0][:2], torch.tensor([0.9, 0.35]), torch.tensor([5, 6]))
    draw_val_predictions(tmp_path / "val.png", images, [found], boxes, labels, NAMES)
    pixels = read(tmp_path / "val.png")[:-40]
    half = pixels.shape[1] // 2
    assert count_of(pixels[:, :half], colour_of(5)) > 100
    assert not count_of(pixels, colour_of(6))  # below the threshold
    for label in range(3):
        assert not count_of(pixels[:, :half], colour_of(label))
        assert count_of(pixels[:, half:], colour_of(label)) > 100


def test_the_threshold_and_the_classes_are_written(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(run_pictures, "_save", lambda *arguments: written.update(arguments=arguments))
    images, boxes, labels = batch(1, objects=0)
    found = Detections(torch.zeros(60, 4), torch.ones(60), torch.arange(60))
    draw_val_predictions("val.png", images, [found], boxes, labels, NAMES, 0.25)
    _, shown, title, heads, legend = written["arguments"]
    assert (len(shown), title) == (2, "Predictions on 1 validation image")
    assert heads == ["predicted, scores of 0.25 and more", "true"]
    assert [*legend][:2] == ["name 0", "name 1"]
    assert [*legend][-1] == "and 48 more classes"
    assert legend["name 7"] == colour_of(7)


def test_pictures_are_deterministic(tmp_path):
    for name in ("a.png", "b.png"):
        draw_train_batch(tmp_path / name, *batch(3), NAMES)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
