import logging
import re
import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from dino.d2.training import engine
from dino.d2.training.run_setup import run_setup
from dino.training import run_log

from ..recipes import tiny_recipe

JOB = SimpleNamespace(config_file="", eval_only=False)
OF_LIBRARIES = ("Average Precision", "copypaste", "index created", "Serializing", "Distribution of", "pkg_resources")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of two iterations with an evaluation: its folder and its console."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(run_log, "write_above_bar", lambda text, stream: lines.extend(text.splitlines()))
        patch.setattr(
            "dino.training.progress_bar.write_above_bar", lambda text, stream: lines.extend(text.splitlines())
        )
        patch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # a process logs the same histogram once
        cfg = tiny_recipe(tmp_path_factory.mktemp("run log"), "train.ema.enabled=True", counts=(3, 0, 1))
        cfg.model.network.denoising.num_denoising = 1
        handlers = list(logging.getLogger("detectron2").handlers)  # other tests' too: Detectron2 adds its own
        with run_setup(cfg, JOB):
            warnings.warn_explicit("a library is old", UserWarning, "/elsewhere/library.py", 3)
            engine.train(cfg, resume=False, recipe="tiny")
        assert logging.getLogger("detectron2").handlers == handlers
    return cfg.train.output_dir, lines


def test_few_lines_come_before_the_first_iteration(logged):
    folder, lines = logged
    first = next(number for number, line in enumerate(lines) if line.startswith("iteration 1/2"))
    start = lines[:first]
    assert len(start) <= 25
    assert start[0] == "training tiny"
    assert any(
        re.match(r"  train +3 images, 1 of them without objects; 4 objects of 3 classes: red ", x) for x in start
    )
    assert f"  look at    {folder}/train_batch.png after the first iteration: do the boxes fit?" in start
    warned = [line for line in start if line.startswith("warning:")]
    assert warned
    assert any("image_1.png has 3 objects, more than the 1 denoising queries per image" in line for line in warned)


def test_nothing_of_libraries_is_on_the_console(logged):
    text = "\n".join(logged[1])
    assert not [words for words in (*OF_LIBRARIES, "a library is old", "sys.platform") if words in text]


def test_an_evaluation_and_the_end_are_short(logged):
    folder, lines = logged
    last = max(number for number, line in enumerate(lines) if line.startswith("evaluation"))
    assert [line.split(" AP")[0].strip() for line in lines[last + 1 : last + 3]] == ["raw weights", "averaged weights"]
    assert lines[last + 3].startswith("AP by class  red ")
    end = lines[lines.index("next:") :]
    val = folder.removesuffix("run") + "val"
    assert end[1:] == [
        f"  dino predict '{folder}' photo.jpg",
        f"  dino eval '{folder}' '{val}/annotations.json' '{val}'",
    ]


def test_everything_is_in_the_file(logged):
    with open(f"{logged[0]}/log.txt", encoding="utf-8") as file:
        text = file.read()
    for words in ("sys.platform", "complete recipe:", "a library is old", "training tiny", "training plan", "iter 1/2"):
        assert words in text
    assert not [words for words in OF_LIBRARIES[:5] if words not in text]
    assert not [letter for letter in set(text) if ord(letter) < 32 and letter not in "\n\t"]


def test_importing_the_plugin_prints_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import dino.d2"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
