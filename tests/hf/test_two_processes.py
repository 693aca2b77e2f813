"""Two processes of `accelerate launch` compute what one does with the pictures of both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.d2.processes import environment

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]
# The flag --cpu starts one process where MPI is missing, whatever --num_processes says.
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
QUIET = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def launch(*program, folder=ROOT):
    """Run a program in two processes on the CPU, which talk by gloo."""
    command = [sys.executable, "-m", *LAUNCH, *QUIET, *map(str, program)]
    variables = environment(ACCELERATE_USE_CPU="true")
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """(number of processes, which) -> {case: gradients}."""
    folder = tmp_path_factory.mktemp("gradients")
    launch("--module", "tests.hf.two_processes", folder)
    command = [sys.executable, "-m", "tests.hf.two_processes", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=300)
    return {
        (number, process): torch.load(folder / f"gradients_{number}_{process}.pth", weights_only=True)
        for number, process in ((1, 0), (2, 0), (2, 1))
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["uneven", "one empty", "accumulated"])
def test_gradients_are_those_of_one_process(gradients, case):
    """Objects are counted over both: 3 and 2, 5 and none, 3 and none then 1 and 1."""
    one, first, second = gradients[1, 0][case], gradients[2, 0][case], gradients[2, 1][case]
    assert len(one) > 50
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.slow
def test_without_any_object_each_process_counts_as_one(gradients):
    """The number of objects a process is at least 1, as published, so the mean of two processes is half of the sum."""
    for name, one in gradients[1, 0]["none"].items():
        torch.testing.assert_close(2 * gradients[2, 0]["none"][name], one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_no_parameter_is_unused_with_denoising(gradients):
    """DDP would stop a process without objects whose denoising layers get no gradients."""
    trained = gradients[1, 0]["denoising"]
    for process in (0, 1):
        found = gradients[2, process]["denoising"]
        assert found.keys() == trained.keys()
        assert all(gradient.isfinite().all() for gradient in found.values())
    assert any("label" in name and gradient.any() for name, gradient in found.items())
