import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino.weights.description import build_network

from .hostile import DESCRIPTIONS, FILES, NETWORK, described

SECONDS, BYTES = 5, 10**9  # of the processor, many times what is needed here; of memory


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Name of a file -> message, seconds and bytes, from another process that reads them all."""
    folder = tmp_path_factory.mktemp("hostile")
    state = build_network({"network": NETWORK}).state_dict()
    described()(folder / "ordinary.pth", state)
    for name, write in FILES.items():
        write(folder / name, state)
    command = [sys.executable, "-m", "tests.weights.hostile", str(folder)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert not (root / "hostile_trace").exists()
    return json.loads(run.stdout)


def test_the_ordinary_file_is_read(results):
    """The tests below mean something only if the file that they change can be read."""
    assert results["ordinary.pth"][0] == "read"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the memory is Linux's")
@pytest.mark.parametrize("name", FILES)
def test_one_line_and_bounded_memory_and_time(results, name):
    message, seconds, grown = results[name]
    assert name in message
    assert "\n" not in message
    assert len(message) < 800
    assert seconds < SECONDS
    assert grown < BYTES


def test_the_reason_is_the_bound_and_not_an_accident(results):
    """Descriptions are refused for what they ask, not because of missing weights."""
    for name in DESCRIPTIONS:
        assert "lacks weights" not in results[f"{name}.pth"][0], name
