import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from dino.data.images import read_image
from dino.utils.files import DataError

from ..coco_files import write_coco
from ..d2.recipes import SHRINK, SMALL, file_arguments
from .programs import ROOT, assert_one_error, contents, load_program, run_here, run_program

RECIPE = ["--config-file", SMALL]


def run(*arguments, folder):
    return run_program("lazyconfig_train_net", *arguments, folder=folder)


def test_help_shows_examples():
    result = run_here("lazyconfig_train_net", "--help")
    assert result.returncode == 0
    assert "python tools/lazyconfig_train_net.py --config-file dino_r50_4scale_12ep" in result.stdout
    assert "--train-json train.json --train-images images --val-json val.json --val-images images" in result.stdout
    for option in ("--train-json", "--val-images", "--eval-only", "--resume", "--num-gpus"):
        assert option in result.stdout
    assert result.stderr == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One command, relative paths, a ResNet-18 from random weights: what a user does first -> folder, words, result."""
    folder = tmp_path_factory.mktemp("trained")
    train = write_coco(folder / "train", category_ids=(7, 40, 900))
    train.change(lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 5]))
    write_coco(folder / "val", category_ids=(7, 40, 900), seed=1)
    words = []
    for split in ("train", "val"):
        words += [f"--{split}-json", f"{split}/annotations.json", f"--{split}-images", split]
    words += [*SHRINK, "train.output_dir=run", "train.max_iter=2", "train.eval_period=0"]
    return folder, words, run(*RECIPE, *words, folder=folder)


def test_training(trained):
    folder, _, result = trained
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "train      4 images, 1 of them without objects" in result.stdout
    assert "iteration 1/2  loss " in result.stdout
    assert (result.stdout + result.stderr).count("1 boxes of no size or outside their image dropped") == 1
    results = json.loads((folder / "run/inference/coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} <= {7, 40, 900}
    assert torch.load(folder / "run/model_final.pth", weights_only=True)["names"] == ["red", "green", "blue"]
    assert {path.name for path in folder.iterdir()} == {"train", "val", "run"}


def test_training_into_the_same_folder_is_refused(trained):
    folder, words, _ = trained
    before = contents(folder)
    del before[Path("run/run.lock")]  # names the process that looked last
    result = run(*RECIPE, *words, folder=folder)
    assert_one_error(
        result, "add --resume, choose another folder (--output), or add --overwrite, which moves it to run.1"
    )
    assert "run holds a run (config.yaml, log.txt, metrics.json, " in result.stderr
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {Path("run/run.lock")}


def test_an_evaluation_changes_nothing_that_exists(trained):
    folder, words, _ = trained
    before = contents(folder)
    result = run(*RECIPE, "--eval-only", *words, "train.init_checkpoint=run/model_final.pth", folder=folder)
    assert result.returncode == 0, result.stderr
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    results = [path for path in after if path.name == "coco_instances_results.json" and path not in before]
    assert len(results) == 1
    assert after[results[0]] == before[Path("run/inference/coco_instances_results.json")]


def test_a_bad_image_ends_the_program_with_one_line(tmp_path):
    """It is found in a worker of the data loader, under Detectron2's own logging of whatever ends a training."""
    train, val = write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)
    for number in range(1, 5):
        (tmp_path / f"train/image_{number}.png").write_text("no image")
    words = [*file_arguments(train, val), *SHRINK, "dataloader.train.num_workers=1", "train.output_dir=run"]
    result = run(*RECIPE, *words, folder=tmp_path)
    assert_one_error(result, f"can't read image {tmp_path}/train/image_")
    assert "Traceback" not in (tmp_path / "run/log.txt").read_text()


def test_the_run_can_be_drawn(trained, tmp_path, capsys):
    """`tools/demo.py` needs the recipe and the weights that a run leaves, nothing else."""
    demo = load_program("demo")
    folder, _, _ = trained
    words = ["--config-file", folder / "run/config.yaml", "--weights", folder / "run/model_final.pth"]
    words += ["--threshold", "0", "--output", tmp_path / "drawn", "--input"]

    def draw(*inputs):
        demo.main([str(word) for word in (*words, *inputs)])

    draw(folder / "val")
    expected = {"predictions.json", *(f"image_{n}.png" for n in range(1, 5))}
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == expected
    original, drawn = (read_image(path / "image_1.png") for path in (folder / "val", tmp_path / "drawn"))
    assert drawn.shape == original.shape
    assert (drawn != original).any()
    assert "4 pictures with 80 objects written" in capsys.readouterr().out
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"image_1\.png is taken\. Choose another --output"):
        draw(folder / "val")
    with pytest.raises(DataError, match="input not found"):
        draw(folder / "absent.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in the folder"):
        draw(tmp_path / "empty")
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.timeout(1200)  # thirteen processes that import torch
def test_of_ten_starts_at_once_exactly_one_runs(tmp_path):
    """Under --overwrite too, which would move the files of a running one."""
    train, val = write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)
    words = [*file_arguments(train, val), "train.output_dir=run", "train.max_iter=8", "train.eval_period=0"]
    command = [sys.executable, ROOT / "tools/lazyconfig_train_net.py", *RECIPE]
    for flags, at_once in (([], 10), (["--overwrite"], 3)):
        starts = [
            subprocess.Popen(
                [*command, *flags, *words, *SHRINK],
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(at_once)
        ]
        outputs = [process.communicate(timeout=900)[0] for process in starts]
        codes = [process.returncode for process in starts]
        ends = codes.count(0)
        assert ends == 1 if not flags else 1 <= ends <= at_once, outputs
        assert set(codes) <= {0, 1}
        for code, output in zip(codes, outputs, strict=True):
            assert "Traceback" not in output
            assert not code or "error: run is in use by another" in output or "error: run holds a run" in output
        assert len((tmp_path / "run/metrics.json").read_text().splitlines()) == 9  # each iteration, the evaluation
        assert (tmp_path / "run/model_final.pth").is_file()
    assert (tmp_path / "run.1/model_final.pth").is_file()
