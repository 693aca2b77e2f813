"""The Slurm script with stand-ins for Slurm's commands. It has met no cluster."""

import os
import shutil
import signal
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


@pytest.mark.parametrize(("last", "requeued"), [("exit 143", True), ("exit 0", False)])
def test_shortly_before_the_time_limit_the_workers_stop_and_the_job_is_requeued(tmp_path, last, requeued):
    """Slurm sends USR1 to the batch shell alone; a training that ends by itself meanwhile is complete."""
    stand_in(tmp_path, "scontrol", f'printf "node1\\n"; echo "$@" >> {tmp_path}/scontrol.txt')
    stand_in(tmp_path, "srun", 'exec "$@"')
    work = f"trap 'echo stopped; {last}' TERM; echo started; for _ in $(seq 600); do sleep 0.1; done"
    stand_in(tmp_path, "torchrun", work)
    settings = {**os.environ, **SLURM, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", SCRIPT], cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGUSR1)
        lines = job.stdout.read().splitlines()
    assert job.returncode == (143 if requeued else 0)
    assert lines[0] == "stopped"
    assert (f"requeue {SLURM['SLURM_JOB_ID']}" in (tmp_path / "scontrol.txt").read_text()) == requeued


def test_slurm_is_asked_for_the_signal():
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@120" in options
    assert "#SBATCH --requeue" in options
