"""Starts the tiny recipe in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def environment(**changes):
    """One thread, no GPU, and nothing of a launcher that may have started the tests."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "LOCAL_", "RANK", "WORLD"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **changes}


def command(folder, *arguments, launcher=()):
    """The words that train the tiny recipe in `folder`/run; `launcher`: options of torchrun, which then starts it."""
    start = [sys.executable, "-m", *(["torch.distributed.run", *launcher] if launcher else [])]
    module = ["--module", "tests.d2.tiny_run"] if launcher else ["tests.d2.tiny_run"]
    return [*start, *module, "--folder", str(folder), *map(str, arguments)]


def run_tiny(folder, *arguments, launcher=(), **changes):
    """Run to the end -> the completed process."""
    return subprocess.run(
        command(folder, *arguments, launcher=launcher),
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )


def checkpoint(folder, name="model_final"):
    """The content of a checkpoint, without what may differ: the commit, and the recipe, which names the folder."""
    content = torch.load(Path(folder, "run", f"{name}.pth"), map_location="cpu", weights_only=True)
    del content["about"]["commit"], content["about"]["recipe"]
    return content


def losses(folder):
    """Iteration -> total loss."""
    lines = map(json.loads, Path(folder, "run/metrics.json").read_text().splitlines())
    return [(line["iteration"], line["total_loss"]) for line in lines if "total_loss" in line]


def assert_same(ours, theirs, place=""):
    """Two nested states are equal to the last bit."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            assert_same(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{place}.{number}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), place
