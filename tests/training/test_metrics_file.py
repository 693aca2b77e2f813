import json
import math
import random

import pytest

from dino.training.curves import draw_curves
from dino.training.metrics_file import append_metrics, forget_metrics, read_metrics
from dino.utils.files import UserError

LINES = [
    {"iteration": 0, "total_loss": 5.0, "lr": 1e-3},
    {"iteration": 1, "total_loss": 4.0},
    {"iteration": 2, "bbox/AP": 10.0},
    {"iteration": 2, "total_loss": 3.0},
]


@pytest.fixture
def path(tmp_path):
    for line in LINES:
        append_metrics(tmp_path / "metrics.json", line)
    return tmp_path / "metrics.json"


def test_what_is_written_is_read(path):
    assert read_metrics(path) == LINES
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES
    assert read_metrics(path.with_name("absent.json")) == []


def test_a_resumed_run_forgets_what_came_after_its_start(path):
    assert forget_metrics(path, 2) == {0: 5.0, 1: 4.0}
    assert read_metrics(path) == LINES[:3]  # the evaluation after two iterations stays
    assert forget_metrics(path, 0) == {}
    assert read_metrics(path) == []
    assert forget_metrics(path.with_name("absent.json"), 3) == {}
    assert not path.with_name("absent.json").exists()


DAMAGED = [
    *(
        b'{"iteration": 7, "tot',
        b"5",
        b"null",
        b"[]",
        b"{}",
        b'"iteration"',
        b'{"total_loss": 1}',
        b"\xff\xfe\x00",
        b"",
    ),
    *(b'{"iteration": "7"}', b'{"iteration": null}', b'{"iteration": 1.5}', b'{"iteration": true}', b"[" * 100_000),
    *(b'{"iteration": ' + b"9" * 5000 + b"}", b"\x1b[2J", b'{"iteration": [1]}'),
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:20]))
def test_a_damaged_line_costs_that_line(path, line):
    path.write_bytes(line + b"\n" + path.read_bytes() + line)
    assert read_metrics(path) == LINES
    assert forget_metrics(path, 2) == {0: 5.0, 1: 4.0}


@pytest.mark.parametrize("value", ['"high"', "null", "NaN", "Infinity", "1e400", "[1]", "true", "9" * 400])
def test_a_value_that_is_no_number(path, value):
    path.write_text(f'{{"iteration": 0, "total_loss": {value}}}\n{{"iteration": 1, "total_loss": 4.0}}\n')
    assert len(read_metrics(path)) == 2
    draw_curves(path.parent)
    assert forget_metrics(path, 5) == {1: 4.0}


def test_any_bytes(path):
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 20)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        assert all(type(entry["iteration"]) is int for entry in read_metrics(path))
        assert all(math.isfinite(loss) for loss in forget_metrics(path, 2).values())
    draw_curves(path.parent)


def test_a_file_that_can_not_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"can't write .*absent/metrics\.json"):
        append_metrics(tmp_path / "absent/metrics.json", {"iteration": 1})
