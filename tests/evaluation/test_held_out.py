"""`dino check --halves` and `--weights`: who predicts what, and what is written."""

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from dino import cli
from dino.data.coco import read_annotations
from dino.inference.predictor import Prediction, Predictor
from dino.structures import Detections
from dino.training import plain

from ..coco_files import NAMES, write_coco

COUNTS = (4, 3, 0, 5, 2, 4)


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path / "data mit ä", counts=COUNTS, category_ids=(7, 40, 900))


@pytest.fixture(autouse=True)
def models(tmp_path_factory, monkeypatch):
    """Files of these names, which stand for checkpoints: the command looks whether they are there."""
    monkeypatch.chdir(tmp_path_factory.mktemp("models"))
    for name in ("a.pth", "b.pth", "m.pth"):
        Path(name).write_bytes(b"")


def check(*words):
    return cli.main(["check", *map(str, words)])


class Oracle:
    """Stands for a predictor: finds the objects of the file, and keeps what it was asked."""

    asked: ClassVar[dict] = {}

    def __init__(self, files, checkpoint):
        self.files, self.asked[checkpoint.name] = files, []
        self.names, self.seen = [*NAMES[::-1], "another"], self.asked[checkpoint.name]

    def stream(self, paths):
        data = self.files.read()
        names = {c["id"]: c["name"] for c in data["categories"]}
        ids = {image["file_name"]: image["id"] for image in data["images"]}
        for path in paths:
            self.seen.append(path.name)
            objects = [a for a in data["annotations"] if a["image_id"] == ids[path.name]]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]
            labels = [self.names.index(names[a["category_id"]]) for a in objects]
            size = Image.open(path).size[::-1]
            yield Prediction(detections(boxes, labels), [self.names[label] for label in labels], size, path)


def detections(boxes, labels):
    import torch

    boxes, scores = torch.tensor(boxes).float().reshape(-1, 4), torch.full((len(labels),), 0.9)
    return Detections(boxes, scores, torch.tensor(labels, dtype=torch.int64))


@pytest.fixture
def oracle(files, monkeypatch):
    """Models that know the file as it was."""
    known = write_coco(Path(files.images), counts=COUNTS, category_ids=(7, 40, 900))
    known = known._replace(annotations=str(Path(files.annotations).with_name("known.json")))
    known.write(files.read())
    monkeypatch.setattr(Oracle, "asked", {})
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda checkpoint, **_: Oracle(known, checkpoint))
    return Oracle.asked


def test_each_model_judges_the_half_that_it_was_not_trained_on(files, oracle, tmp_path, capsys):
    halves = tmp_path / "halves"
    assert check(*files, "--halves", halves) == 0
    assert f"--halves {halves} --label-errors" in capsys.readouterr().out
    trained = [{i["file_name"] for i in json.loads((halves / f"half_{n}.json").read_text())["images"]} for n in "ab"]
    assert check(*files, "--halves", halves, "--weights", "a.pth", "b.pth") == 0
    assert set(oracle["a.pth"]) == trained[1]
    assert set(oracle["b.pth"]) == trained[0]
    assert len(oracle["a.pth"]) + len(oracle["b.pth"]) == len(COUNTS)
    assert "likely label errors: 0" in capsys.readouterr().out


def test_proposals_and_their_page(files, oracle, tmp_path, capsys):
    removed = files.read()["annotations"][5]

    def spoil(content):
        content["annotations"].remove(removed)

    files.change(spoil)
    out = tmp_path / "errors.json"
    assert check(*files, "--weights", "m.pth", "--label-errors", out) == 0
    text = capsys.readouterr().out
    assert "one model judges all images: if m.pth was trained on them" in text
    content = read_annotations(out, files.images)
    (proposal,) = content["annotations"]
    assert proposal["bbox"] == removed["bbox"]
    assert (proposal["category_id"], proposal["image_id"]) == (removed["category_id"], removed["image_id"])
    assert (proposal["kind"], proposal["rank"], proposal["annotation_id"]) == ("missing", 1, None)
    assert proposal["score"] == pytest.approx(0.9, abs=1e-4)
    assert [image["id"] for image in content["images"]] == [removed["image_id"]]
    page = (tmp_path / "errors.html").read_text()
    assert page.count("<figure") == 1
    assert "data:image/jpeg;base64," in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert check(*files, "--weights", "m.pth", "--label-errors", out) == 1  # never replaced
    assert "errors.json exists" in capsys.readouterr().err


def test_names_can_not_become_markup(files, oracle, tmp_path):
    def spoil(content):
        content["annotations"].pop(0)
        content["images"][0]["file_name"] = "<b>x.png"

    (Path(files.images) / "image_1.png").rename(Path(files.images) / "<b>x.png")
    known = Path(files.annotations).with_name("known.json")
    known.write_text(known.read_text().replace("image_1.png", "<b>x.png"))
    files.change(spoil)
    assert check(*files, "--weights", "m.pth", "--label-errors", tmp_path / "e.json") == 0
    assert "<b>x" not in (tmp_path / "e.html").read_text()


def test_classes_that_the_model_lacks_are_named(files, oracle, capsys):
    files.change(lambda c: c["categories"][1].update(name="violet"))
    assert check(*files, "--weights", "m.pth") == 0
    assert "not judged: ['violet']" in capsys.readouterr().out


def test_no_class_in_common(files, oracle, capsys):
    files.change(lambda c: [entry.update(name=f"c{entry['id']}") for entry in c["categories"]])
    assert check(*files, "--weights", "m.pth") == 1
    assert "no class in common" in capsys.readouterr().err


def test_halves_of_other_annotations(files, oracle, tmp_path, capsys):
    assert check(*files, "--halves", tmp_path / "halves") == 0
    other = write_coco(tmp_path / "other", counts=(1, 2))
    assert check(*other, "--halves", tmp_path / "halves", "--weights", "a.pth", "b.pth") == 1
    assert "are not those of" in capsys.readouterr().err
    assert check(*files, "--halves", tmp_path / "halves") == 1
    assert "exists" in capsys.readouterr().err


def test_annotations_with_errors_are_not_judged(files, oracle, capsys):
    files.change(lambda c: c["annotations"][0].update(bbox=[1, 1, 0, 0]))
    assert check(*files, "--weights", "m.pth") == 1
    assert "no label errors were looked for" in capsys.readouterr().out
    assert oracle == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "a.pth", "b.pth"], "--weights takes one model, or two with --halves"),
        (["--weights", "a.pth", "--halves", "h"], "--weights takes one model, or two with --halves"),
        (["--label-errors", "e.json"], "--label-errors needs --weights"),
        (["--weights", "a.pth", "--label-errors", "e.html"], "--label-errors names a JSON file"),
    ],
)
def test_flags_that_do_not_fit(files, capsys, words, message):
    with pytest.raises(SystemExit):
        check(*files, *words)
    assert message in capsys.readouterr().err


def test_a_real_checkpoint_and_a_missing_one(files, tmp_path, capsys):
    settings = plain.Settings(size=64, embed_dim=32, layers=1, queries=10, device="cpu")
    plain.save(tmp_path / "model.pth", plain.build(settings, NAMES), settings)
    assert check(*files, "--weights", tmp_path / "model.pth", "--label-errors", tmp_path / "errors.json") == 0
    assert "likely label errors:" in capsys.readouterr().out
    assert (tmp_path / "errors.html").exists()
    assert check(*files, "--weights", tmp_path / "none.pth") == 2
    assert "weights not found" in capsys.readouterr().err
