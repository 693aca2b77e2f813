"""The console's way without Detectron2: a recipe by name, a folder that is held, an evaluation alone."""

import json
import os
import signal
import subprocess
import sys

import pytest

from dino import cli
from dino.inference.predictor import Predictor
from dino.training import recipe_training
from dino.training.recipe_reading import save_recipe

from ..d2.processes import ROOT, assert_same, checkpoint, losses
from .tiny_recipe import SHRINK, tiny_recipe, write_sets


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take most of the time of a tiny run."""
    monkeypatch.setattr(recipe_training, "draw_curves", lambda *_: None)


def test_train_resume_and_evaluate(tmp_path, capsys):
    """A real recipe and its backbone, at a small size."""
    train, val = write_sets(tmp_path, counts=(1, 2))
    words = ["train", "dino_r18_small_data", "--engine", "plain", "--train", *train, "--val", *val, *SHRINK]
    words += ["--output", str(tmp_path / "run"), "train.eval_period=0"]
    assert cli.main([*words, "train.max_iter=1"]) == 0
    said = capsys.readouterr().out
    assert "training dino_r18_small_data" in said
    assert "tensorboard" not in said
    assert f"dino predict {tmp_path / 'run'} photo.jpg" in said
    log = (tmp_path / "run/log.txt").read_text()
    assert "engine: plain, without Detectron2" in log

    assert cli.main([*words, "train.max_iter=2"]) == 1  # the folder is in use
    assert "add --resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "train.max_iter=2"]) == 0
    lines = map(json.loads, (tmp_path / "run/metrics.json").read_text().splitlines())
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1]
    assert "starts at iteration 1" in capsys.readouterr().out

    weights = tmp_path / "run/model_final.pth"
    predictor = Predictor.from_checkpoint(weights)
    assert predictor.names == ["red", "green", "blue"]
    assert cli.main([*words, "--eval-only", "--weights", str(weights)]) == 0
    assert (tmp_path / "run/evaluation/inference/coco_instances_results.json").is_file()
    assert "AP50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus", "2"], "several processes needs Detectron2"),
        (["--resume"], "nothing to resume"),
        (["--eval-only"], "--eval-only needs weights"),
        (["train.wandb.enabled=True"], "train.wandb.enabled=True needs Detectron2"),
    ],
)
def test_one_line_for_what_is_wrong(tmp_path, capsys, words, message):
    train, val = write_sets(tmp_path, counts=(1,))
    given = ["train", "dino_r18_small_data", "--engine", "plain", "--train", *train, "--val", *val, *words]
    assert cli.main([*given, "--output", str(tmp_path / "run")]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


KILLED = """
import os, signal, sys
from dino.cli import main
from dino.training.recipe_step import RecipeStep

take = RecipeStep.take

def take_or_die(step, parts):
    if step.iter == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    take(step, parts)

RecipeStep.take = take_or_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_resumes_to_the_same_bits(tmp_path):
    """Six iterations equal three, kill -9 and three more; the kernel frees the lock. The reading process is another."""
    wishes = ("train.max_iter=6", "train.ema.enabled=True", "train.eval_period=3", "train.checkpointer.period=2")
    cfg = tiny_recipe(tmp_path, *wishes, "dataloader.train.num_workers=1", counts=(2, 0, 3, 1, 2, 1))
    save_recipe(cfg, tmp_path / "tiny.yaml")
    words = ["train", str(tmp_path / "tiny.yaml"), "--engine", "plain", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words, str(tmp_path / "broken/run")], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for name, more in (("broken", ["--resume"]), ("whole", [])):
        result = subprocess.run([sys.executable, "-m", "dino", *words, str(tmp_path / name / "run"), *more], **options)
        assert result.returncode == 0, result.stdout + result.stderr
    assert_same(*(checkpoint(tmp_path / name) for name in ("broken", "whole")))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
