"""`dino eval` with a model: detections of a checkpoint, and the report about them."""

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog

import dino
from dino import cli
from dino.d2.checkpoint import Checkpointer
from dino.d2.recipe_description import describe

from ..coco_files import write_coco
from ..tools.programs import run_verb
from .recipes import SHRINK, file_arguments, load_recipe

RECIPE = ["--config-file", "dino_r18_small_data"]


def save_model(folder, names, *arguments):
    """A checkpoint of random weights for data of these classes; returns its path."""
    cfg = load_recipe("--eval-only", *arguments, *SHRINK)
    model = instantiate(cfg.model)
    Checkpointer(model, str(folder), names=names, about=describe(cfg)).save("model")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> folder with a space and an umlaut, data, weights."""
    folder = tmp_path_factory.mktemp("ein Lauf ä")
    files = write_coco(folder / "val", category_ids=(7, 40, 900))
    return folder, files, save_model(folder, ["red", "green", "blue"], *file_arguments(val=files))


def evaluate(folder, files, weights, *more, **variables):
    words = ["eval", *RECIPE, "--weights", weights, *file_arguments(val=files), *more]
    return run_verb(*words, *SHRINK, folder=folder, **variables)


def test_a_checkpoint_is_evaluated(trained):
    folder, files, weights = trained
    result = evaluate(folder, files, weights, "--output", "out put")
    assert result.returncode == 0, result.stderr
    assert "report written to out put/report.html" in result.stdout
    metrics = json.loads((folder / "out put/metrics.json").read_text())
    results = json.loads((folder / "out put/inference/coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} <= {7, 40, 900}
    page = (folder / "out put/report.html").read_text()
    assert f"AP {100 * metrics['AP']:.1f} on 4 images" in page
    assert "Recipe: dino_r18_small_data" in page


def test_data_without_annotations_gives_predictions(trained, tmp_path):
    _, files, weights = trained
    content = files.read()
    del content["annotations"]
    unlabelled = files._replace(annotations=str(tmp_path / "images.json"))
    unlabelled.write(content)
    result = evaluate(tmp_path, unlabelled, weights, "--output", "out")
    assert result.returncode == 0, result.stderr
    assert "has no annotations: the page shows" in result.stdout
    assert "4 images without annotations" in (tmp_path / "out/report.html").read_text()
    assert json.loads((tmp_path / "images.json").read_text()) == content


def test_a_registered_set(tmp_path):
    """Detectron2 registers coco_2017_val_100 under DETECTRON2_DATASETS."""
    metadata = MetadataCatalog.get("coco_2017_val_100")
    names = list(metadata.thing_classes)
    files = write_coco(tmp_path / "coco/val2017")
    content = files.read()
    ids = metadata.thing_dataset_id_to_contiguous_id
    content["categories"] = [{"id": number, "name": names[label]} for number, label in ids.items()]
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/instances_val2017_100.json").write_text(json.dumps(content))
    all_classes = files._replace(annotations=str(tmp_path / "all.json"))
    all_classes.write(content)
    weights = save_model(tmp_path, names, *file_arguments(val=all_classes))
    words = ["--weights", weights, "--dataset", "coco_2017_val_100", "--output", "out", *SHRINK]
    result = run_verb("eval", *RECIPE, *words, folder=tmp_path, DETECTRON2_DATASETS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "out/report.html").read_text()
    assert "Data: coco_2017_val_100" in page
    assert "of 80 classes" in page
    assert "data:image/jpeg" in page


def results_of(folder, part="inference"):
    return json.loads((folder / part / "coco_instances_results.json").read_text())


def test_a_checkpoint_needs_no_recipe(trained):
    """It says what its model is and how large its images are: the same boxes, to the last bit."""
    folder, files, weights = trained
    words = ["--output", folder / "alone", *file_arguments(val=files), "dataloader.test.num_workers=0"]
    assert cli.main(["eval", "--weights", *map(str, [weights, *words])]) == 0
    if not (folder / "out put").exists():
        evaluate(folder, files, weights, "--output", "out put")
    assert results_of(folder / "alone") == results_of(folder / "out put")
    assert (folder / "alone/metrics.json").read_text() == (folder / "out put/metrics.json").read_text()
    assert "Recipe" not in (folder / "alone/report.html").read_text()


@pytest.mark.slow
def test_two_processes_find_the_same(trained):
    folder, files, weights = trained
    for number in (1, 2):
        words = ["--output", f"with {number}", "--num-gpus", number, "dataloader.test.num_workers=0"]
        result = run_verb("eval", "--weights", weights, *file_arguments(val=files), *words, folder=folder)
        assert result.returncode == 0, result.stderr
    assert results_of(folder / "with 2") == results_of(folder / "with 1")
    assert (folder / "with 2/metrics.json").read_text() == (folder / "with 1/metrics.json").read_text()


def test_what_the_checkpoint_says_must_fit(trained, tmp_path, capsys, monkeypatch):
    _, _, weights = trained
    files = write_coco(tmp_path / "other")
    files.change(lambda content: content["categories"].append({"id": 4, "name": "black"}))
    data = file_arguments(val=files)
    (tmp_path / "bare.pth").write_bytes(b"")
    for path, message in (
        (tmp_path / "bare.pth", "bare.pth"),
        (weights, "has 3 classes, the data has 4, and the model does not know black"),
    ):
        assert cli.main(["eval", "--weights", str(path), "--output", str(tmp_path / "out"), *data]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["eval", "--weights", str(weights), "--output", str(tmp_path / "out"), *data]) == 1
    assert "write --num-gpus N instead of torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_some_of_the_classes_are_evaluated(trained, tmp_path):
    _, _, weights = trained
    files = write_coco(tmp_path / "some", category_ids=(5, 3))
    result = run_verb("eval", "--weights", weights, *file_arguments(val=files), "--output", "out", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} == {3, 5}


MISSING = {
    "weights": ([*RECIPE, "--weights", "absent.pth"], "weights not found: absent.pth"),
    "no weights": (RECIPE, "give a checkpoint: dino eval CHECKPOINT"),
    "recipe": (["--config-file", "dino_r51", "--weights", "x"], "recipe not found: 'dino_r51'"),
    "no recipe": (["--weights", "absent.pth"], "weights not found: absent.pth"),
}


@pytest.mark.parametrize(("words", "message"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_named(trained, tmp_path, capsys, words, message):
    _, files, _ = trained
    code = 1 if message.startswith("give") else 2
    assert cli.main(["eval", *words, *file_arguments(val=files), "--output", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def annotate(files, results):
    """Let every fourth detection be an object, shifted by a pixel, so that AP is neither 0 nor 1."""
    boxes = [(r, [r["bbox"][0] + 1, *r["bbox"][1:]]) for r in results[::4]]
    entries = [
        {"id": n, "image_id": r["image_id"], "category_id": r["category_id"], "bbox": box, "iscrowd": 0}
        for n, (r, box) in enumerate(boxes, 1)
    ]
    files.change(lambda content: content.update(annotations=entries))


def add_average(path, seed=1):
    """Add averaged weights to a checkpoint, which differ from the others."""
    content = torch.load(path)
    generator = torch.Generator().manual_seed(seed)
    noisy = {
        key: value + 0.05 * torch.randn(value.shape, generator=generator)
        if key.startswith("network.decoder")
        else value
        for key, value in content["model"].items()
    }
    torch.save({**content, "ema": {"model": noisy, "updates": 3}}, path)


@pytest.mark.parametrize(
    "categories",
    [pytest.param((7, 40, 900), marks=pytest.mark.slow), (40, 7)],
    ids=["all classes", "some classes"],
)
def test_both_roads_find_the_same(tmp_path, categories, capsys):
    """With Detectron2 and without: AP of raw and averaged weights."""
    files = write_coco(tmp_path / "val", category_ids=categories)
    every = write_coco(tmp_path / "every")
    weights = save_model(tmp_path, ["red", "green", "blue"], *file_arguments(val=every))
    add_average(weights)
    roads = {"plain": tmp_path / "plain", "detectron2": tmp_path / "full"}
    val = (files.annotations, files.images)
    dino.evaluate(weights, val=val, output=tmp_path / "first", engine="plain")
    annotate(files, results_of(tmp_path / "first", "inference/averaged"))  # of which the report is
    metrics = {road: dino.evaluate(weights, val=val, output=roads[road], engine=road) for road in roads}
    assert 0.05 < metrics["plain"]["AP"] < 0.9
    for key, value in metrics["detectron2"].items():
        if isinstance(value, float):
            assert metrics["plain"][key] == pytest.approx(value, abs=1e-6)
    names = ("inference/coco_instances_results.json", "inference/averaged/coco_instances_results.json")
    for name in names:
        one, other = (json.loads((folder / name).read_text()) for folder in roads.values())
        assert [r["category_id"] for r in one] == [r["category_id"] for r in other]
        assert np.allclose([r["bbox"] for r in one], [r["bbox"] for r in other], atol=1e-3)
        assert np.allclose([r["score"] for r in one], [r["score"] for r in other], atol=1e-5)
    assert (roads["plain"] / names[0]).read_text() != (roads["plain"] / names[1]).read_text()
    assert "averaged weights: AP " in capsys.readouterr().out
