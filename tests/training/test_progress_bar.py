import io
import re

import pytest

from dino.training import progress_bar
from dino.training.progress_bar import ProgressLine


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress_bar.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress_bar, "_memory", lambda: ["memory 812 MiB"])
    return Clock(monkeypatch)


def run(stream, clock, start=0, stop=20, message_at=None):
    with ProgressLine(start, stop, 5.0, stream=stream) as line:
        for iteration in range(start + 1, stop + 1):
            clock.now += 2
            line.step(iteration, {"loss": 30 / iteration})
            if iteration == message_at:
                line.message("a warning")


def test_a_file_gets_a_plain_line_every_few_seconds(clock):
    stream = io.StringIO()
    run(stream, clock, stop=8)
    assert stream.getvalue() == (
        "iteration 1/8  loss 30  ETA 0:00:14  memory 812 MiB\n"
        "iteration 4/8  loss 7.5  ETA 0:00:08  memory 812 MiB\n"
        "iteration 7/8  loss 4.286  ETA 0:00:02  memory 812 MiB\n"
        "iteration 8/8  loss 3.75  ETA 0:00:00  memory 812 MiB\n"
    )


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(clock):
    stream = Terminal()
    run(stream, clock, stop=8, message_at=5)
    text = stream.getvalue()
    assert re.search(r"iteration  62%\|.*\| 5/8 \[.*, loss 6, ETA 0:00:06, memory 812 MiB\]", text)
    assert "\ra warning\n" in text
    assert not text.split("\r")[-2].strip()  # spaces over the bar
    assert text.endswith("\r")


def test_the_eta_is_of_what_is_left_after_a_resume(clock):
    stream = io.StringIO()
    run(stream, clock, start=15)
    assert stream.getvalue().startswith("iteration 16/20  loss 1.875  ETA 0:00:08  memory")


def test_an_evaluation_between_two_iterations_does_not_count(clock):
    stream = io.StringIO()
    with ProgressLine(0, 20, stream=stream) as line:
        for iteration in range(1, 11):
            clock.now += 600 if iteration == 6 else 1
            line.step(iteration, {})
    assert "iteration 6/20  ETA 0:00:14" in stream.getvalue()


def test_memory_is_that_of_the_process_without_a_gpu(monkeypatch):
    monkeypatch.setattr(progress_bar.torch.cuda, "is_available", lambda: False)
    (text,) = progress_bar._memory()
    assert 50 < int(re.fullmatch(r"memory (\d+) MiB", text)[1]) < 1e6
    monkeypatch.setattr(progress_bar, "resource", None)
    assert progress_bar._memory() == []
