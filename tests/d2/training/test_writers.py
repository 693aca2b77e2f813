import json
import logging
import sys
import types

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
from detectron2.utils.events import EventStorage
from PIL import Image

from dino.d2.training import batch_pictures, writers
from dino.utils.files import DataError

from ..tiny import random_input, tiny_detector


def test_console_shows_one_short_line(caplog):
    writer = writers.ConsoleWriter(max_iter=10)
    with EventStorage(4) as storage, caplog.at_level(logging.INFO):
        losses = {f"loss_{n}": 1.0 for n in ("ce", "bbox", "giou", "ce_dn_0")}
        storage.put_scalars(total_loss=4.0, lr=1e-4, time=2.0, **losses)
        writer.write()
    line = caplog.records[-1].getMessage()
    assert line.startswith("iter 4/10  total_loss 4.000  loss_ce 1.000  loss_bbox 1.000  loss_giou 1.000")
    assert "loss_ce_dn_0" not in line
    assert "lr 1.00e-04  eta 0:00:10" in line


class FakeWandb(types.ModuleType):
    """Remembers what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return types.SimpleNamespace(id=options["id"] or "abc123", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, path):
        return f"image of {path}"


def test_wandb_gets_numbers_and_pictures_once_and_resumes_the_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Image.new("RGB", (2, 2)).save(tmp_path / "train_batch.png")
    writer = writers.WandbWriter(str(tmp_path), {"seed": 1}, project="dino")
    with EventStorage(3) as storage:
        storage.put_scalar("total_loss", 4.0)
        writer.write()
        writer.write()
        storage.iter = 4
        storage.put_scalar("total_loss", 3.0)
        storage.put_scalar("bbox/AP", 10.0)
        writer.write()
    writer.close()
    assert fake.logged == [
        (3, {"total_loss": 4.0, "train_batch": f"image of {tmp_path}/train_batch.png"}),
        (4, {"total_loss": 3.0, "bbox/AP": 10.0}),
    ]
    assert fake.finished == 1
    writers.WandbWriter(str(tmp_path), {}, project="dino")
    assert [options["id"] for options in fake.inits] == [None, "abc123"]
    assert fake.inits[0]["config"] == {"seed": 1}
    assert fake.inits[0]["resume"] == "allow"


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DataError, match=r"train\.wandb\.enabled=True needs wandb: pip install wandb"):
        writers.WandbWriter(str(tmp_path), {}, project="dino")


def write_metrics(folder, *entries, end=""):
    path = folder / "metrics.json"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)
    return path


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path):
    """Also the half of a line that a kill leaves; an evaluation of the weights that are continued with stays."""
    first = [{"iteration": n, "total_loss": 5.0 - n} for n in range(4)]
    path = write_metrics(tmp_path, *first, {"iteration": 2, "bbox/AP": 7.0}, end='{"iteration": 4, "tot')
    writers.forget_metrics(path, start=2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [*first[:2], {"iteration": 2, "bbox/AP": 7.0}]


def test_curves(tmp_path):
    losses = [{"iteration": n, "total_loss": 20.0 / (n + 1), "loss_ce": 1.0} for n in range(5)]
    write_metrics(tmp_path, *losses, {"iteration": 4, "bbox/AP": 3.0, "ema/bbox/AP": float("nan")})
    assert writers._read_metrics(tmp_path / "metrics.json")["bbox/AP"] == {4: 3.0}
    writers.draw_curves(str(tmp_path))
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1100, 400)
    assert not list(tmp_path.glob("*.part"))


def test_curves_of_a_run_that_logged_nothing(tmp_path):
    writers.draw_curves(str(tmp_path))
    assert (tmp_path / "curves.png").is_file()


def colors(path):
    with Image.open(path) as image:
        return {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}


def test_the_first_batch_is_drawn_with_its_denoising_queries(tmp_path):
    model = tiny_detector()
    batch = [random_input("a.png", 2, height=128, width=160), random_input("b.png", 0)]
    for x in batch:
        x["image"].fill_(128)
    batch_pictures._draw_batch(model, batch, ["red", "green", "blue"], str(tmp_path / "batch.png"))
    green, blue, red = (0, 255, 0), (0, 191, 255), (255, 0, 0)
    assert {green, blue, red} <= colors(tmp_path / "batch.png")


def test_no_negative_of_a_crowd_is_drawn_as_a_positive(tmp_path, monkeypatch):
    """An image with more objects than the denoising budget shows as many queries of each kind as the budget holds."""
    model, drawn = tiny_detector(), []
    model.network.denoising.num_denoising = 3
    monkeypatch.setattr(batch_pictures, "_draw", lambda picture, boxes, *_: (drawn.append(len(boxes)), picture)[1])
    batch_pictures._draw_batch(model, [random_input("a.png", 5)], ["x"] * 3, str(tmp_path / "batch.png"))
    assert drawn == [3, 3, 5]  # negatives, positives, objects


def test_a_batch_without_objects_is_drawn(tmp_path):
    batch_pictures._draw_batch(tiny_detector(), [random_input("a.png", 0)], ["x"] * 3, str(tmp_path / "batch.png"))
    assert (tmp_path / "batch.png").is_file()


def test_predictions_are_drawn_above_the_truth(tmp_path):
    x = random_input("a.png", height=64, width=80)
    x["image"].fill_(128)
    x |= {"height": 128, "width": 160, "annotations": [{"bbox": [20.0, 20.0, 60.0, 60.0]}]}
    path = tmp_path / "val.png"
    model = tiny_detector().eval()
    batch_pictures.draw_predictions(model, [x], ["red", "green", "blue"], str(path), threshold=0.0)
    assert {(0, 255, 0), (255, 255, 0)} <= colors(path)
    batch_pictures.draw_predictions(model, [x], ["red", "green", "blue"], str(path), threshold=1.1)
    rows, columns = np.nonzero(np.array(Image.open(path))[..., 1] == 255)
    assert (rows.min(), columns.min(), columns.max()) == (10, 10, 30)  # half the size
    assert (255, 255, 0) not in colors(path)
