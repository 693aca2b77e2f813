"""A run that is interrupted and continued equals one that is not, to the last bit."""

import json
import signal

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from ...training.tiny_recipe import LOSSLESS
from ..processes import assert_same, checkpoint, losses, run_tiny

WHOLE = ("dataloader.train.num_workers=1", *LOSSLESS)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    result = run_tiny(folder, *WHOLE)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def assert_same_run(folder, unbroken):
    content = checkpoint(folder)
    assert content["trainer"]["iteration"] == 5
    assert {"model", "trainer", "ema"} <= content.keys()
    assert content["ema"]["updates"] == 6
    assert content["trainer"]["scaler"]
    assert_same(content, checkpoint(unbroken))
    assert losses(folder) == losses(unbroken)
    assert [iteration for iteration, _ in losses(folder)] == list(range(6))
    ours, theirs = (json.loads((x / "run/evaluations.json").read_text()) for x in (folder, unbroken))
    assert ours == theirs
    assert [entry["iteration"] for entry in ours] == [3, 6]
    assert "ema/bbox/AP" in ours[0]


def test_killed_and_resumed(tmp_path, unbroken):
    """Killed in the fourth iteration: two are in the checkpoint, one is lost and done again."""
    killed = run_tiny(tmp_path, *WHOLE, KILL_AT="0:3")
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_0000001.pth"
    resumed = run_tiny(tmp_path, "--resume", *WHOLE)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_run(tmp_path, unbroken)


def test_sigterm_of_the_group_stops_as_ctrl_c_does(tmp_path):
    """As Slurm sends it: the worker that reads images must survive it too."""
    stopped = run_tiny(tmp_path, *WHOLE, "train.checkpointer.period=100", INTERRUPT_AT="0:2", SIGNAL="TERM")
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    assert "stopped after 3 iterations; --resume continues" in stopped.stdout
    assert "Traceback" not in stopped.stdout + stopped.stderr
    assert checkpoint(tmp_path, "model_0000002")["trainer"]["iteration"] == 2
    assert not list((tmp_path / "run").glob("*.part"))


def test_stopped_by_ctrl_c_and_resumed(tmp_path, unbroken):
    """The whole process group gets the signal, as from a terminal: the worker that reads images must survive it."""
    stopped = run_tiny(tmp_path, *WHOLE, "train.checkpointer.period=100", INTERRUPT_AT="0:2")
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert "stopped after 3 iterations; --resume continues" in stopped.stdout
    assert "Traceback" not in stopped.stdout + stopped.stderr
    assert not (tmp_path / "run/model_final.pth").exists()
    resumed = run_tiny(tmp_path, "--resume", *WHOLE)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_run(tmp_path, unbroken)
