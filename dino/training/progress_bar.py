"""The progress of a training on the console: a bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import datetime
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

import torch
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}{postfix}]"
_COLUMNS = 100  # of a terminal that does not know its width
_WINDOW = 50  # iterations whose median time makes the ETA: an evaluation between two of them does not count


class ProgressLine:
    """Shows how far a training is: a context manager.

    In a terminal it is a bar below the other output. In a file or a pipe it is a plain line every few seconds, without
    control characters.

    Args:
        start: completed iterations at the start, more than 0 in a resumed run.
        stop: iterations of the whole training.
        every: seconds between two plain lines.
        label: what is counted.
        stream: where to write; None for the standard output.
    """

    def __init__(
        self, start: int, stop: int, every: float = 5.0, *, label: str = "iteration", stream: TextIO | None = None
    ):
        self._done, self._stop = start, stop
        self._every = every
        self._label = label
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._last = self._printed = 0.0  # seconds of the monotonic clock; 0: no line yet
        self._bar: tqdm | None = None
        self._stream = stream or sys.stdout

    def __enter__(self) -> ProgressLine:
        self._last = time.monotonic()
        if self._stream.isatty():
            self._bar = tqdm(
                desc=f"{self._label} ",
                total=self._stop,
                initial=self._done,
                file=self._stream,
                bar_format=_FORMAT,
                leave=False,
                **_width(self._stream),
            )
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show the progress, if it is time to.

        Args:
            iteration: how many are completed.
            values: what to show beside ETA and memory, for example {"loss": 12.3}.
        """
        now = time.monotonic()
        self._times += [(now - self._last) / max(iteration - self._done, 1)]
        advance, self._done, self._last = iteration - self._done, iteration, now
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._parts(values)), refresh=False)
            self._bar.update(advance)
        elif not self._printed or now - self._printed >= self._every or iteration >= self._stop:
            self._printed = now
            self.message("  ".join([f"{self._label} {iteration}/{self._stop}", *self._parts(values)]))

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        write_above_bar(text, self._stream)

    def _parts(self, values: Mapping[str, float]) -> list[str]:
        """The values, the remaining time and the memory, as text."""
        shown = [f"{name} {value:.4g}" for name, value in values.items()]
        seconds = statistics.median(self._times) * (self._stop - self._done)
        return [*shown, f"ETA {datetime.timedelta(seconds=round(seconds))}", *_memory()]


def _width(stream: TextIO) -> dict[str, int | bool]:
    """tqdm's options for a terminal that may not know its width, as in a container."""
    try:
        known = os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": _COLUMNS}


def write_above_bar(text: str, stream: TextIO) -> None:
    """Print text, above a bar if there is one."""
    tqdm.write(text, file=stream)
    stream.flush()


def _memory() -> list[str]:
    """The most memory so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return [f"memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"]
    if resource is None:
        return []
    unit = 1 if sys.platform == "darwin" else 1024
    return [f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"]
