"""The Slurm script with stand-ins for Slurm's commands. It has met no cluster."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .programs import ROOT

SCRIPT = ROOT / "tools/slurm_train.sh"
SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}


def stand_in(folder, name, body):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def submit(folder, *words, torchrun, **environment):
    """Run the script as a batch job's shell would, with srun running its command once."""
    stand_in(folder, "scontrol", 'printf "node1\\nnode2\\n"')
    stand_in(folder, "srun", 'exec "$@"')
    stand_in(folder, "torchrun", torchrun)
    settings = {**os.environ, **SLURM, **environment, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", SCRIPT, *words], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)


def test_torchrun_gets_the_job(tmp_path):
    body = 'printf "%s\\n" "$@"; echo "store=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"'
    words = ["--config-file", "a recipe.py", "train.output_dir=x"]
    result = submit(tmp_path, *words, torchrun=body, SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    options = dict(zip(lines[:12:2], lines[1:12:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "8",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "123456",
        "--rdzv-endpoint": "node1:23456",
    }
    assert lines[12:] == ["tools/lazyconfig_train_net.py", *words, "store=1"]


def test_the_program_comes_up_under_it(tmp_path):
    """With the real torchrun, which asks the program for its help."""
    body = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    alone = {"SLURM_JOB_NUM_NODES": "1", "PROCESSES": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = submit(tmp_path, "--help", torchrun=body.replace('"$@"', '"${@/node1/localhost}"'), **alone)
    assert result.returncode == 0, result.stderr
    assert "--config-file" in result.stdout


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    result = subprocess.run([SHELLCHECK, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
