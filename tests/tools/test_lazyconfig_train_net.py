import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from ..coco_files import write_coco
from ..d2.recipes import SHRINK, SMALL, file_arguments
from .programs import assert_one_error, contents, run_program

RECIPE = ["--config-file", SMALL]


def run(*arguments, folder):
    return run_program("lazyconfig_train_net", *arguments, folder=folder)


def test_help_shows_examples(tmp_path):
    result = run("--help", folder=tmp_path)
    assert result.returncode == 0
    assert "python tools/lazyconfig_train_net.py --config-file configs/dino_r50_4scale_12ep.py" in result.stdout
    assert "--train-json train.json --train-images images --val-json val.json --val-images images" in result.stdout
    for option in ("--train-json", "--val-images", "--eval-only", "--resume", "--num-gpus"):
        assert option in result.stdout
    assert result.stderr == ""


def test_train_evaluate_and_refuse(tmp_path):
    """As a user does it: one command, relative paths, a ResNet-18 from random weights."""
    write_coco(tmp_path / "train", category_ids=(7, 40, 900))
    write_coco(tmp_path / "val", category_ids=(7, 40, 900), seed=1)
    data = []
    for split in ("train", "val"):
        data += [f"--{split}-json", f"{split}/annotations.json", f"--{split}-images", split]
    options = [*SHRINK, "train.output_dir=run", "train.max_iter=2", "train.eval_period=0"]
    trained = run(*RECIPE, *data, *options, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "4 training images, 1 without objects (kept)" in trained.stdout
    assert "iter 1/2  total_loss" in trained.stdout
    assert "Traceback" not in trained.stdout + trained.stderr
    results = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} <= {7, 40, 900}
    assert torch.load(tmp_path / "run/model_final.pth", weights_only=True)["names"] == ["red", "green", "blue"]
    assert {path.name for path in tmp_path.iterdir()} == {"train", "val", "run"}

    before = contents(tmp_path / "run")
    refused = run(*RECIPE, *data, *options, folder=tmp_path)
    assert_one_error(refused, "run holds the checkpoints of a run: add --resume, or choose another train.output_dir")
    assert contents(tmp_path / "run") == before


def test_a_bad_image_ends_the_program_with_one_line(tmp_path):
    """It is found in a worker of the data loader, under Detectron2's own logging of whatever ends a training."""
    train, val = write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)
    for number in range(1, 5):
        (tmp_path / f"train/image_{number}.png").write_text("no image")
    words = [*file_arguments(train, val), *SHRINK, "dataloader.train.num_workers=1", "train.output_dir=run"]
    result = run(*RECIPE, *words, folder=tmp_path)
    assert_one_error(result, f"can't read image {tmp_path}/train/image_")
    assert "Traceback" not in (tmp_path / "run/log.txt").read_text()
