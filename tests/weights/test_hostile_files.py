import json
import sys

import pytest

from dino.weights.description import build_network

from .hostile import DESCRIPTIONS, FILES, NETWORK, described, run_apart

SECONDS, BYTES = 5, 10**9  # of the processor, many times what is needed here; of memory


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Name of a file -> message, seconds and bytes, from another process that reads them all."""
    folder = tmp_path_factory.mktemp("hostile")
    state = build_network({"network": NETWORK}).state_dict()
    described()(folder / "ordinary.pth", state)
    for name, write in FILES.items():
        write(folder / name, state)
    return json.loads(run_apart("tests.weights.hostile", folder))


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
