"""What programs that fill a table of trainings share: the lock and the process of a cell, and the loop over cells."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from dino.utils.files import UserError, make_folder

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.2  # seconds between looks at the running processes
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Named(Protocol):
    """A cell: any value with the name of its files and in messages."""

    @property
    def name(self) -> str:
        """Relative path without a suffix."""


class Running(NamedTuple):
    """A running cell. `lock` stays open as long; `about` goes into its result; `output` is what it prints."""

    cell: Any
    process: subprocess.Popen
    lock: IO
    output: Path
    about: dict
    began: float
    slot: int


class Table(NamedTuple):
    """What `run_cells` needs of a table.

    Args:
        jobs: cells at a time.
        begin: (cell, slot) -> its process, None if the cell is locked or done; a slot is one of `range(jobs)`.
        finish: writes the result of an ended cell, from its processor seconds.
        summary: one line about a finished cell.
    """

    jobs: int
    begin: Callable[[Any, int], Running | None]
    finish: Callable[[Running, float], None]
    summary: Callable[[Any], str]


def die_with_parent(parent: int) -> Callable[[], None]:
    """First action of a new process: have Linux kill it when the runner ends."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl:
            prctl(DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != parent:  # the runner has ended already
                os._exit(1)

    return prepare


def lock(path: Path) -> IO | None:
    """Lock a cell. Its process inherits the lock. None if another program or an orphan holds it."""
    make_folder(path.parent)
    file = path.open("w")  # closed when the process has ended
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def launch(cell: Named, command: list[str], output: Path, held: IO, about: dict, slot: int) -> Running:
    """Start `command`, whose first word is `python`, in the root of the repository, on one core or GPU."""
    gpu = slot % max(1, torch.cuda.device_count())
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(gpu)}
    make_folder(output.parent)
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            pass_fds=[held.fileno()],
            preexec_fn=die_with_parent(os.getpid()),
            start_new_session=True,  # Ctrl-C comes here, and `run_cells` passes it on
        )
    return Running(cell, process, held, output, about, time.monotonic(), slot)


def ended(running: Running) -> tuple[int, float] | None:
    """Exit code and processor seconds of an ended process and its children; None if it still runs."""
    pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
    if not pid:
        return None
    running.process.returncode = os.waitstatus_to_exitcode(status)
    return running.process.returncode, usage.ru_utime + usage.ru_stime


def last_line(path: Path) -> str:
    """Last line of a failed process's output."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "no output")


def settle(running: Running, code: int, seconds: float, table: Table) -> str:
    """Write the result of an ended cell -> an error message, or ""."""
    try:
        if code:
            return f"{running.cell.name} failed: {last_line(running.output)} ({running.output})"
        table.finish(running, seconds)
        return ""
    except (OSError, ValueError, LookupError, AttributeError) as error:  # the run's record is incomplete
        return f"{running.cell.name} failed: its record can't be read: {error} ({running.output})"
    finally:
        running.lock.close()


def fill(busy: list[Running], waiting: list[Named], table: Table, bar: tqdm) -> None:
    """Begin cells until `table.jobs` run."""
    while waiting and len(busy) < table.jobs:
        slot = min(set(range(table.jobs)) - {running.slot for running in busy})
        begun = table.begin(waiting.pop(0), slot)
        busy += [begun] if begun else []
        bar.update(begun is None)
        bar.set_postfix_str(", ".join(running.cell.name for running in busy))


def collect(busy: list[Running], table: Table, bar: tqdm) -> list[str]:
    """Write the results of ended cells -> error messages."""
    failures = []
    for running in list(busy):
        if found := ended(running):
            busy.remove(running)
            failure = settle(running, *found, table)
            failures += [failure] if failure else []
            bar.update()
            bar.write(failure or table.summary(running.cell), file=sys.stderr)
    return failures


def run_cells(cells: list, table: Table) -> list[str]:
    """Run the open cells, `table.jobs` at a time, in this order -> error messages."""
    waiting, failures = list(cells), []
    busy: list[Running] = []
    try:
        with tqdm(total=len(cells), desc="cells", unit="cell") as bar:
            while waiting or busy:
                fill(busy, waiting, table, bar)
                failures += collect(busy, table, bar)
                time.sleep(POLL)
    finally:
        for running in busy:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
    return failures


def exit_with(run: Callable[[], list[str]]) -> None:
    """Run a program that returns error messages; end the process with them, or with the error that it raises."""
    try:
        failures = run()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    if failures:
        sys.exit(f"error: {len(failures)} cells failed: " + "; ".join(failures))
