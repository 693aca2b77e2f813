"""`dino eval` without Detectron2. `tests/d2/test_evaluate_checkpoint.py` compares it with Detectron2's road."""

import json
import sys

import numpy as np
import pytest
import torch

from dino import api, cli
from dino.evaluation.plain_detection import detect
from dino.evaluation.report.evaluate import write_evaluation
from dino.inference.predictor import Predictor
from dino.utils.files import DataError, UserError

from ..coco_files import write_coco
from ..inference.test_predictor import write_checkpoint
from ..weights.test_inferred_description import network, official_file


@pytest.fixture
def without_detectron2(monkeypatch):
    """As on a machine that lacks it."""
    monkeypatch.setattr("dino.api.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "dino.d2.evaluate_checkpoint", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    write_checkpoint(path)
    return str(path)


def results_in(folder, part="inference"):
    return json.loads((folder / part / "coco_instances_results.json").read_text())


def test_the_console(checkpoint, tmp_path, capsys, without_detectron2):
    files = write_coco(tmp_path / "val", category_ids=(7, 40, 900))
    data = ["--val-json", files.annotations, "--val-images", files.images]
    assert cli.main(["eval", "--weights", checkpoint, *data, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "report written to" in printed
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    page = (tmp_path / "out/report.html").read_text()
    assert f"AP {100 * metrics['AP']:.1f} on 4 images" in page
    assert {f"Data: {files.annotations}" in page, f"Weights: {checkpoint}" in page} == {True}
    assert {r["category_id"] for r in results_in(tmp_path / "out")} <= {7, 40, 900}
    assert "averaged" not in printed


def test_boxes_are_those_of_the_predictor(checkpoint, tmp_path):
    """But for the folding of norms."""
    files = write_coco(tmp_path / "val")
    detected = detect(tmp_path / "out", checkpoint, files.annotations, files.images, device="cpu")
    predictor = Predictor(checkpoint, device="cpu", score_thresh=0)
    entries = json.loads(detected.results.read_text())
    for number, path in detected.files.items():
        ours = [entry for entry in entries if entry["image_id"] == number]
        expected = predictor(path).to_coco(image_id=number)
        assert [e["category_id"] for e in ours] == [e["category_id"] for e in expected]
        assert np.allclose([e["bbox"] for e in ours], [e["bbox"] for e in expected], atol=1e-2)
        assert np.allclose([e["score"] for e in ours], [e["score"] for e in expected], atol=1e-4)


def test_data_without_annotations_gives_predictions(checkpoint, tmp_path, capsys):
    files = write_coco(tmp_path / "val")
    files.change(lambda content: content.pop("annotations"))
    detected = detect(tmp_path / "out", checkpoint, files.annotations, files.images)
    assert write_evaluation(tmp_path / "out", detected) == {}
    assert "has no annotations: the page shows" in capsys.readouterr().out
    assert len(results_in(tmp_path / "out")) > 0


def test_some_of_the_classes(checkpoint, tmp_path):
    """By name, whatever their order: the other classes' detections take no places."""
    files = write_coco(tmp_path / "some", category_ids=(5, 3))  # green, then red
    detected = detect(tmp_path / "out", checkpoint, files.annotations, files.images)
    found = Predictor(checkpoint, device="cpu", score_thresh=0)(detected.files[1])
    red_first = {"red": 5, "green": 3}
    expected = {(red_first[n], round(s, 4)) for n, s in zip(found.names, found.scores.tolist()) if n in red_first}  # noqa: B905
    ours = {(e["category_id"], round(e["score"], 4)) for e in results_in(tmp_path / "out") if e["image_id"] == 1}
    assert expected
    assert expected <= ours


def test_a_file_of_another_program(tmp_path):
    weights = official_file(tmp_path / "checkpoint0011_4scale.pth", network(num_classes=3).eval())
    content = torch.load(weights, weights_only=False)
    torch.save({**content, "names": ["red", "green", "blue"]}, weights)
    files = write_coco(tmp_path / "val", counts=(1,))
    detected = detect(tmp_path / "out", str(weights), files.annotations, files.images)
    assert write_evaluation(tmp_path / "out", detected)["AP"] >= 0


def test_averaged_weights_get_a_folder_of_their_own(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint)
    averaged = {key: 1.2 * value if "class_heads" in key else value for key, value in content["model"].items()}
    torch.save({**content, "ema": {"model": averaged, "updates": 3}}, tmp_path / "both.pth")
    files = write_coco(tmp_path / "val")
    one = detect(tmp_path / "one", checkpoint, files.annotations, files.images)
    two = detect(tmp_path / "two", str(tmp_path / "both.pth"), files.annotations, files.images)
    assert "Copy" not in one.details
    assert two.details["Copy"] == "averaged weights, as dino predict uses them"
    assert two.results.parent.name == "averaged"
    assert results_in(tmp_path / "two") == results_in(tmp_path / "one")
    assert results_in(tmp_path / "two", "inference/averaged") != results_in(tmp_path / "one")
    assert not (tmp_path / "one/inference/averaged").exists()
    printed = capsys.readouterr().out
    assert "weights as trained: AP " in printed
    assert "averaged weights: AP " in printed


def add_class(content):
    content["categories"].append({"id": 4, "name": "black"})


def turn(content):
    content["images"][1].update(width=64, height=72)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_class, "has 3 classes, the data has 4, and the model does not know black"),
        (turn, "image_2.png is 72x64, but the annotations say 64x72"),
        (lambda content: content["images"][2].update(file_name="gone.png"), "image not found: .*gone.png"),
        (lambda content: content["images"][2].update(file_name="../gone.png"), "leaves the image folder"),
    ],
)
def test_what_does_not_fit(checkpoint, tmp_path, change, message):
    files = write_coco(tmp_path / "val")
    files.change(change)
    with pytest.raises(DataError, match=message):
        detect(tmp_path / "out", checkpoint, files.annotations, files.images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "dino_r18_small_data"], "--config-file needs Detectron2"),
        (["--num-gpus=2"], "--num-gpus needs Detectron2"),
        (["train.seed=2"], "key=value needs Detectron2"),
    ],
)
def test_what_needs_detectron2_is_named(checkpoint, tmp_path, capsys, words, message, without_detectron2):
    files = write_coco(tmp_path / "val", counts=(1,))
    data = ["--val-json", files.annotations, "--val-images", files.images]
    assert cli.main(["eval", "--weights", checkpoint, *data, *words, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{message}, which is not installed here" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_data_of_detectron2_are_named(tmp_path, without_detectron2):
    with pytest.raises(UserError, match="--dataset needs Detectron2, which is not installed here"):
        api.detect(tmp_path / "out", "model.pth", dataset="coco_2017_val")
    for weights, data in ((None, ("a", "b")), ("model.pth", (None, None))):
        with pytest.raises(UserError, match="give checkpoint and data: dino eval CHECKPOINT ANNOTATIONS IMAGES"):
            api.detect(tmp_path / "out", weights, val_json=data[0], val_images=data[1])
