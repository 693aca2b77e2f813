"""Two processes over gloo, started by torchrun."""

import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import instantiate

from dino.d2.training import engine

from ..in_parts import assert_equal_steps, groups, in_float64, step
from ..processes import ROOT, assert_same, checkpoint, command, environment, losses, run_tiny
from ..recipes import tiny_recipe
from ..two_processes import BASE, EVEN, ONE_EMPTY, UNEVEN

TWO = ("--standalone", "--nproc-per-node", "2")
OPTIONS = (
    "train.max_iter=4",
    "train.eval_period=0",
    "train.checkpointer.period=2",
    "train.ema.enabled=True",
    "train.log_matching=True",
    "model.network.decoder._target_=dino.modeling.SharedHeadsDecoder",  # the harder case: one tensor of many names
)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """What each of two processes found, and the folder where bad batches are."""
    folder = tmp_path_factory.mktemp("halves")
    words = [sys.executable, "-m", "torch.distributed.run", *TWO, "--module", "tests.d2.two_processes"]
    result = subprocess.run(
        [*words, str(folder), *groups()], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [torch.load(folder / f"results_{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("recipe", groups())
def test_two_halves_equal_the_whole_batch(halves, recipe):
    """Of images of one size: halves that are equally full; halves in two parts; a process without any object.

    For an exact comparison denoising adds no noise in the first case, and takes noise, groups and padding queries of
    the whole batch in the others.
    """
    options = {"own_denoising": False, "change": in_float64}
    whole = {
        "whole": step(recipe, EVEN, (4,), change=in_float64),
        "parts": step(recipe, UNEVEN, (4,), **options),
        "wrapped": step(recipe, ONE_EMPTY, (4,), wrapper="own", **options),
    }
    for result in halves:  # of both processes
        for name, expected in whole.items():
            assert_equal_steps(result["results"][recipe, name], expected)


def test_two_halves_of_a_sharded_model_equal_the_whole_batch(halves):
    expected = step(BASE, UNEVEN, (4,), own_denoising=False)
    for result in halves:
        assert_equal_steps(result["results"]["fsdp"], expected)


def test_both_processes_skip_a_step_that_is_bad_on_one(halves):
    """And count it, for every kind of losses, also wrapped, in parts and sharded."""
    for result in halves:
        assert len(result["skipped"]) == 2 * len(groups()) + 1
        assert set(result["skipped"].values()) == {(1, True, True)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes: one image each, some without any object."""
    folder = tmp_path_factory.mktemp("pair")
    result = run_tiny(folder, *OPTIONS, launcher=TWO)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_evaluation_on_two_processes_equals_that_on_one(pair, tmp_path):
    """Six images on two processes, then on one: nothing is lost or counted twice."""
    record = json.loads((pair / "run/evaluations.json").read_text())
    cfg = tiny_recipe(tmp_path, counts=(2, 0, 3, 1, 2, 1))
    cfg.train.init_checkpoint = str(pair / "run/model_final.pth")
    alone = engine.evaluate_checkpoint(cfg)
    for name, value in alone["bbox"].items():
        assert record[-1][f"bbox/{name}"] == pytest.approx(value, abs=1e-9, nan_ok=True) or value != value
        assert record[-1][f"ema/bbox/{name}"] == pytest.approx(alone["ema"]["bbox"][name], abs=1e-9) or value != value
    found = [
        json.loads((x / "inference/coco_instances_results.json").read_text()) for x in (pair / "run", tmp_path / "run")
    ]
    ours, theirs = (sorted((r["image_id"], r["category_id"], r["score"]) for r in results) for results in found)
    assert len(ours) == len(theirs) == len(set(ours)) == 6 * 20


def test_metrics_of_both_processes_are_averaged(pair):
    """Each has one image, so that a mean of wrong numbers is not one of whole ones."""
    lines = map(json.loads, (pair / "run/metrics.json").read_text().splitlines())
    found = [line for line in lines if "total_loss" in line]
    assert all(0 <= line["class_error"] <= 100 for line in found)
    assert any(line[name] % 1 == 0.5 for line in found for name in ("cardinality_error", "count_error"))
    assert all(sum(v for k, v in x.items() if "loss_" in k[:5]) == pytest.approx(x["total_loss"]) for x in found)


def test_a_killed_worker_costs_one_checkpoint_period(pair, tmp_path):
    """Torchrun starts both again; they continue from the checkpoint without being told to, and come to the same end."""
    result = run_tiny(tmp_path, *OPTIONS, launcher=(*TWO, "--max-restarts", "1"), KILL_AT="1:3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Starting training from iteration 2" in result.stdout
    assert_same(checkpoint(tmp_path), checkpoint(pair))
    assert losses(tmp_path) == losses(pair)


def test_shards_equal_whole_models(pair, tmp_path):
    """FSDP2: the same losses and weights as DDP, in a checkpoint of the same form, which needs no FSDP to be loaded."""
    result = run_tiny(tmp_path, *OPTIONS, "train.parallel=fsdp", launcher=TWO)
    assert result.returncode == 0, result.stdout + result.stderr
    for (_, ours), (_, theirs) in zip(losses(tmp_path), losses(pair), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = checkpoint(tmp_path), checkpoint(pair)
    for part in (lambda x: x["model"], lambda x: x["ema"]["model"]):
        assert part(ours).keys() == part(theirs).keys()
        for name, value in part(theirs).items():
            torch.testing.assert_close(part(ours)[name], value, rtol=1e-4, atol=1e-5)
    moments = [{key: s.keys() for key, s in x["trainer"]["optimizer"]["state"].items()} for x in (ours, theirs)]
    assert moments[0] == moments[1]
    cfg = tiny_recipe(tmp_path)
    instantiate(cfg.model).load_state_dict(ours["model"])

    # Continued, with an AP of 0 as before: early stopping ends both processes together.
    stopping = ("train.max_iter=12", "train.eval_period=1", "train.best.patience=1", "train.parallel=fsdp")
    resumed = run_tiny(tmp_path, "--resume", *OPTIONS, *stopping, launcher=TWO)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Starting training from iteration 4" in resumed.stdout
    assert "training ended after 5 of 12 iterations" in resumed.stdout


def test_ctrl_c_stops_all_processes_after_the_same_iteration(tmp_path):
    """With Detectron2's launcher; the signal reaches all, and may find them in different iterations."""
    result = run_tiny(tmp_path, "--num-gpus", "2", *OPTIONS, INTERRUPT_AT="1:1")
    assert result.returncode == 130, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "stopped after 2 iterations; --resume continues" in result.stdout
    assert checkpoint(tmp_path, "model_0000001")["trainer"]["iteration"] == 1


def stop(folder, *words, launcher=()):
    """Start two processes, send SIGTERM to the first process alone once they train -> exit code, output."""
    words = command(folder, *words, *OPTIONS, "train.max_iter=500", launcher=launcher)
    log = folder / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        while process.poll() is None and "iter 2/500" not in log.read_text():
            time.sleep(0.1)
        process.terminate()
        return process.wait(timeout=120), log.read_text()


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all_processes(tmp_path):
    code, output = stop(tmp_path, "--num-gpus", "2")
    assert code == 143, output
    assert "Traceback" not in output
    assert "iterations; --resume continues" in output
    assert (tmp_path / "run/last_checkpoint").is_file()


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_processes(tmp_path):
    """Torchrun passes it on, and gives its workers 30 seconds."""
    code, output = stop(tmp_path, launcher=TWO)
    assert code != 0
    assert "iterations; --resume continues" in output
    assert (tmp_path / "run/last_checkpoint").is_file()


@pytest.mark.slow
def test_a_killed_process_is_one_line(tmp_path):
    result = run_tiny(tmp_path, "--num-gpus", "2", *OPTIONS, KILL_AT="1:3")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
