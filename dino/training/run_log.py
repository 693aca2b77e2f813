"""The log of a run: every detail in log.txt of its folder, few lines on the console."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

from dino.utils.files import UserError, make_folder
from dino.utils.library_warnings import is_own
from dino.utils.printable import printable

from .progress_bar import ProgressLine, write_above_bar
from .shards import process_rank

logger = logging.getLogger("detectron2")
console = logging.getLogger("detectron2.dino.console")  # for people: the console shows it, log.txt too
_LOGGERS = ("detectron2", "fvcore")
_ABBREVIATED = re.compile(r"^d2(?=\.)")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


class _File(logging.Formatter):
    """Detectron2's form of a line, without control characters."""

    def __init__(self):
        super().__init__("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        return printable(_COLOURS.sub("", super().format(record)), None, kept="\n\t")


class _Console(logging.Handler):
    """Shows what is meant for people: lines of `console`, and warnings of this project.

    It holds the warnings back until `take_warnings`: the summary at the start shows them.
    """

    def __init__(self):
        super().__init__()
        self.stream = sys.stdout
        self.held: list[str] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, hold it, or leave it to the file."""
        text = printable(record.getMessage(), None, kept="\n\t")
        name = _ABBREVIATED.sub("detectron2", record.name)  # a handler of Detectron2 may have come first
        if name == console.name:
            write_above_bar(text, self.stream)
        elif name.startswith("detectron2.dino") and record.levelno >= logging.WARNING:
            if self.held is None:
                write_above_bar(f"warning: {text}", self.stream)
            else:
                self.held.append(text)

    def take(self) -> list[str]:
        """The held warnings; later ones are shown at once."""
        held, self.held = self.held or [], None
        return held


def take_warnings() -> list[str]:
    """The warnings that the console holds back, to be shown in the summary; from now on it shows each at once."""
    found = [handler for handler in logger.handlers if isinstance(handler, _Console)]
    return [text for handler in found for text in handler.take()]


def show(lines: Sequence[str]) -> None:
    """Show lines on the console of the main process, and write them to its log."""
    for line in [] if process_rank() else lines:
        console.info(line)


class Watched:
    """A loader whose progress the console shows.

    Args:
        loader: of batches; has a length.
        label: what is counted.
    """

    def __init__(self, loader: Sized, label: str):
        self.loader, self.label = loader, label
        self.stream = sys.stdout  # before `prints_to_log`

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        if process_rank():
            yield from self.loader
            return
        with ProgressLine(0, len(self), label=self.label, stream=self.stream) as line:
            for number, batch in enumerate(self.loader, 1):
                yield batch
                line.step(number, {})


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Within the block, what libraries print goes to the log."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        if text.getvalue().strip():
            logger.info(f"printed:\n{text.getvalue().rstrip()}")


@contextlib.contextmanager
def run_log(folder: str | Path) -> Iterator[None]:
    """Within the block, log into the folder of a run.

    The warnings of other libraries go to log.txt alone.

    Raises:
        UserError: the folder can't be written.
    """
    rank = process_rank()
    handlers = [_open_file(Path(folder), rank), *([] if rank else [_Console()])]
    kept = {name: logging.getLogger(name).propagate for name in _LOGGERS}
    for name in _LOGGERS:
        log = logging.getLogger(name)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        for handler in handlers:
            log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _log_warning
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no compiler is needed to train
            yield
    finally:
        for text in take_warnings():  # an error came before the summary
            console.warning(f"warning: {text}")
        for name in _LOGGERS:
            log = logging.getLogger(name)
            log.propagate = kept[name]
            for handler in handlers:
                log.removeHandler(handler)
        for handler in handlers:
            handler.close()


def _open_file(folder: Path, rank: int) -> logging.Handler:
    """The handler of the log file."""
    make_folder(folder)
    path = folder / ("log.txt" + (f".rank{rank}" if rank else ""))
    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"can't write {path}: {error}") from error
    handler.setFormatter(_File())
    return handler


def _log_warning(message, category, filename, lineno, *_) -> None:
    """Log a warning of Python's `warnings`: on the console too if it is of this project."""
    if is_own(filename):
        logging.getLogger("detectron2.dino").warning(str(message))
    else:
        logger.warning(f"{filename}:{lineno}: {category.__name__}: {message}")
