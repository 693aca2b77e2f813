import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dino.cli import report_errors
from dino.training import stop_signal
from dino.training.stop_signal import Stopped, StopSignal
from dino.utils.files import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers():
    """Those of the tests, afterwards too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before
    assert not stop_signal._entered


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_for_a_stop(capfd, number, code):
    calls = []
    with StopSignal("stopping soon", lambda: calls.append(1)) as stop:
        assert (stop.requested, stop.exit_code) == (False, 0)
        for _ in range(3):  # launchers repeat the signals of a terminal
            os.kill(os.getpid(), number)
        assert (stop.requested, stop.exit_code) == (True, code)
    assert calls == [1]
    assert capfd.readouterr().err == "\nstopping soon\n"


def test_the_first_signal_gives_the_code():
    with StopSignal("") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 143


def test_a_later_signal_stops_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopSignal("") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 2.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested


def test_outside_of_the_main_thread_nothing_changes():
    seen = []

    def work():
        with StopSignal("") as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


GROUP = """
import os, signal, subprocess, time
from dino.training.stop_signal import StopSignal

with StopSignal("") as stop:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # as a data loader's worker
        os.write(writing, b"ready")
        time.sleep(60)
        os._exit(5)
    os.read(reading, 5)
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", "--", f"-{os.getpgrp()}"], start_new_session=True)
    time.sleep(0.3)
    assert stop.exit_code == 143
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the worker has died of the group's signal"
    os.kill(child, signal.SIGTERM)  # as Python and torch end their workers
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_workers_survive_the_signals_of_the_group_and_obey_their_parent():
    result = subprocess.run(
        [sys.executable, "-c", GROUP], cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert (result.stdout, result.stderr) == ("ended 0\n", "")


def test_the_exit_code_of_a_stopped_program(capsys):
    def stop():
        raise Stopped(143, "stopped after 3 iterations")

    assert report_errors(stop) == 143
    assert capsys.readouterr().err == "stopped after 3 iterations\n"
    assert report_errors(lambda: (_ for _ in ()).throw(Stopped(130))) == 130
    assert capsys.readouterr().err == ""


def test_sigterm_lets_other_programs_clean_up(tmp_path):
    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            (tmp_path / "cleaned").touch()

    with pytest.raises(SystemExit) as caught:
        report_errors(work)
    assert caught.value.code == 143
    assert (tmp_path / "cleaned").exists()


def test_errors_stay_errors():
    def fail():
        with StopSignal(""):
            raise UserError("a bad image")

    assert report_errors(fail) == 1
