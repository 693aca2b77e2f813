"""Ctrl-C and SIGTERM end a training after its iteration, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

from dino.utils.files import Stopped

__all__ = ["StopSignal", "Stopped"]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_WISH = 2.0  # seconds in which signals count as one: launchers repeat those of a terminal or of Slurm


class StopSignal:
    """Within the block, SIGINT and SIGTERM ask for a stop instead of ending the process.

    A second signal, at least two seconds later, raises a KeyboardInterrupt. Processes that were forked off within the
    block ignore SIGINT. Outside of the main thread, where Python allows no handlers, nothing is changed.

    Args:
        message: written to standard error at the first signal; "" for none.
    """

    def __init__(self, message: str = "stopping after this iteration, with a checkpoint; again: without one"):
        self.message = message
        self._signal = 0
        self._asked_at = 0.0
        self._process = 0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return bool(self._signal)

    @property
    def exit_code(self) -> int:
        """Of a program that was stopped by the signal: 130 or 143; 0 without a request."""
        return 128 + self._signal if self._signal else 0

    def __enter__(self) -> StopSignal:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _on_signal(self, number: int, _: object) -> None:
        if os.getpid() != self._process:  # forked off, as a data loader's workers are
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._signal and time.monotonic() - self._asked_at > _ONE_WISH:
            raise KeyboardInterrupt
        if not self._signal:
            self._signal, self._asked_at = number, time.monotonic()
            if self.message:
                with suppress(OSError):  # not by print: the signal can have interrupted one
                    os.write(2, f"\n{self.message}\n".encode())
