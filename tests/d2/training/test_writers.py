import json
import logging
import resource
import sys
import types

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.utils.events import EventStorage
from PIL import Image

from dino.d2.training import batch_pictures, writers
from dino.inference.palette import colour_of
from dino.training.run_pictures import NEGATIVE, POSITIVE, draw_val_predictions
from dino.utils.files import DataError, UserError

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


def test_console_shows_metrics_that_are_logged(caplog):
    with EventStorage(4) as storage, caplog.at_level(logging.INFO):
        storage.put_scalars(loss_giou=1.0, class_error=62.5, cardinality_error=7.0, count_error=1.25, lr=1e-4)
        writers.ConsoleWriter(max_iter=10).write()
    metrics = "class_error 62.500  cardinality_error 7.000  count_error 1.250"
    assert caplog.records[-1].getMessage() == f"iter 4/10  loss_giou 1.000  {metrics}  lr 1.00e-04"


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


def colors(path):
    with Image.open(path) as image:
        return {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}


def test_the_first_batch_is_drawn_with_its_denoising_queries(tmp_path):
    model = tiny_detector()
    batch = [random_input("a.png", 2, height=128, width=160), random_input("b.png", 0)]
    for x in batch:
        x["image"].fill_(128)
    batch_pictures._draw_batch(model, batch, ["red", "green", "blue"], str(tmp_path / "batch.png"))
    classes = {colour_of(label) for label in batch[0]["instances"].gt_classes.tolist()}
    assert {POSITIVE, NEGATIVE, *classes} <= colors(tmp_path / "batch.png")


def test_no_negative_of_a_crowd_is_drawn_as_a_positive(tmp_path, monkeypatch):
    """An image with more objects than the denoising budget shows as many queries of each kind as the budget holds."""
    model, drawn = tiny_detector(), []
    model.network.denoising.num_denoising = 3
    monkeypatch.setattr(batch_pictures, "draw_train_batch", lambda *arguments: drawn.append(arguments))
    batch_pictures._draw_batch(model, [random_input("a.png", 5)], ["x"] * 3, str(tmp_path / "batch.png"))
    [(_, _, boxes, labels, _, [queries])] = drawn
    assert {colour: len(own) for colour, own in queries.items()} == {POSITIVE: 3, NEGATIVE: 3}
    assert len(boxes[0]) == len(labels[0]) == 5


def test_a_batch_without_objects_is_drawn(tmp_path):
    batch_pictures._draw_batch(tiny_detector(), [random_input("a.png", 0)], ["x"] * 3, str(tmp_path / "batch.png"))
    assert (tmp_path / "batch.png").is_file()


def test_predictions_are_drawn_beside_the_truth(tmp_path, monkeypatch):
    x = random_input("a.png", height=64, width=80)
    x["image"].fill_(128)
    x |= {"height": 128, "width": 160, "annotations": [{"bbox": [20.0, 20.0, 60.0, 60.0], "category_id": 2}]}
    path, drawn = tmp_path / "val.png", []
    model = tiny_detector().eval()
    monkeypatch.setattr(
        batch_pictures,
        "draw_val_predictions",
        lambda *arguments: (drawn.append(arguments), draw_val_predictions(*arguments)),
    )
    batch_pictures.draw_predictions(model, [x], ["red", "green", "blue"], str(path), threshold=0.0)
    _, _, [found], [boxes], [labels], _, threshold = drawn[0]
    assert boxes.tolist() == [[10.0, 10.0, 30.0, 30.0]]  # half the size
    assert labels.tolist() == [2]
    assert len(found.scores) > 0
    assert threshold == 0
    seen = colors(path)
    assert {colour_of(label) for label in {*found.labels.tolist()}} & seen
    batch_pictures.draw_predictions(model, [x], ["red", "green", "blue"], str(path), threshold=1.1)
    assert colour_of(2) in colors(path)
    assert not {colour_of(0), colour_of(1)} & colors(path)


def test_a_full_disk_names_the_file(tmp_path):
    """The kernel takes no more than so many bytes for a file."""
    writer = writers.MetricsWriter(str(tmp_path / "metrics.json"), 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with EventStorage(1) as storage:
            storage.put_scalar("total_loss", 1.0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            with pytest.raises(UserError, match=r"can't write .*metrics\.json: \[Errno 27\] File too large"):
                writer.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.close()
