"""Ctrl-C and SIGTERM end a training after its iteration, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from dino.utils.files import Stopped

__all__ = ["StopSignal", "Stopped"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_WISH = 2.0  # seconds in which signals count as one: launchers repeat those of a terminal or of Slurm
_entered: list[StopSignal] = []  # of this process; a forked process shields itself by them


class StopSignal:
    """Within the block, SIGINT and SIGTERM ask for a stop instead of ending the process.

    A second signal, at least two seconds later, raises a KeyboardInterrupt. Processes that are forked off within the
    block, as a data loader's workers are, ignore both signals, but for a SIGTERM of this process: the signals of a
    terminal or of Slurm reach them too, and the last iteration needs them. Outside of the main thread, where Python
    allows no handlers, nothing is changed.

    Args:
        message: written to standard error at the first signal; "" for none.
        on_request: called at the first signal.
    """

    def __init__(
        self,
        message: str = "stopping after this iteration, with a checkpoint; a second signal stops at once, without one",
        on_request: Callable[[], object] | None = None,
    ):
        self.message = message
        self.on_request = on_request
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
            _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        if self in _entered:
            _entered.remove(self)

    def _on_signal(self, number: int, _: object) -> None:
        if os.getpid() != self._process:
            return
        if self._signal and time.monotonic() - self._asked_at > _ONE_WISH:
            raise KeyboardInterrupt
        if self._signal:
            return
        self._signal, self._asked_at = number, time.monotonic()
        if self.message:
            with suppress(OSError):  # not by print: the signal can have interrupted one
                os.write(2, f"\n{self.message}\n".encode())
        if self.on_request:
            self.on_request()


def _shield() -> None:
    """In a process forked off within a block: leave SIGTERM to a thread, since Python's handlers don't see senders."""
    if _entered:
        _entered.clear()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End this process at a SIGTERM of its parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


if hasattr(os, "register_at_fork") and hasattr(signal, "sigwaitinfo"):  # Linux
    os.register_at_fork(after_in_child=_shield)
