"""The console command `dino`: a table of verbs. A verb's module is imported when the verb is called."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import dino
from dino.cli.parser import SCORE_THRESH, check_arguments, nearest, new_parser
from dino.utils.files import Stopped, UsageError, UserError, message_of
from dino.utils.library_warnings import hide_library_warnings
from dino.utils.printable import printable

hide_library_warnings()  # at import: the processes of a training on several GPUs import this too

__all__ = ["SCORE_THRESH", "VERBS", "check_arguments", "main", "new_parser", "report_errors"]

# Verb -> what it does. Its module here, of the same name with _ for -, has `build_parser()` and `main(argv)`, imports
# nothing heavy before the arguments are parsed, and raises a UserError for what a person can correct.
VERBS = {
    "train": "train or evaluate a recipe, on COCO-format files or a registered data set",
    "eval": "write AP, curves, confusions and the worst images to one report.html",
    "predict": "draw a checkpoint's detections in images, folders, videos or a webcam",
    "data": "convert annotations of other programs to COCO's format, merge or split data sets",
    "check": "check a data set before training",
    "export": "write a checkpoint as ONNX, TorchScript or a program of torch.export",
    "explain": "draw what a checkpoint computes for a training batch",
    "weights": "list the published weights that have a name, and fetch them",
    "convert": "convert checkpoints from and to the formats of other DINO programs",
    "convert-config": "find the recipe and the overrides for a configuration of the official program",
    "env": "print what a bug report needs, and which attention operator runs",
}
_OTHER_VERBS = {  # words of other programs, and parts of verbs
    **dict.fromkeys(("detect", "infer", "inference", "demo", "draw", "visualize", "show"), "predict"),
    **dict.fromkeys(("evaluate", "test", "val", "validate", "validation", "report", "benchmark"), "eval"),
    **dict.fromkeys(("fit", "finetune", "fine-tune", "resume", "run"), "train"),
    **dict.fromkeys(("import", "split", "merge", "dataset"), "data"),
    **dict.fromkeys(("models", "zoo", "download", "list"), "weights"),
    **dict.fromkeys(("info", "version", "checks", "doctor"), "env"),
    **dict.fromkeys(("onnx", "deploy"), "export"),
    **dict.fromkeys(("inspect", "lint"), "check"),
}


def _usage() -> str:
    """The text of `dino --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {does}" for name, does in VERBS.items())
    return (
        f"usage: dino VERB [arguments]\n\nDINO for Detectron2, version {dino.__version__}\n\n{verbs}\n\n"
        "example:\n  dino predict dino_r50_4scale_12ep photo.jpg\n"
        "`dino help VERB` shows the arguments of a verb and examples, `dino --version` the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, 1 after an error of one line, 2 for a wrong command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    _escape_output()
    if words in (["--version"], ["-V"]):
        print(f"dino {dino.__version__}")
        return 0
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] not in VERBS:
        print(f"error: {_describe_unknown(words)}; see `dino --help`", file=sys.stderr)
        return 2
    module = words[0].replace("-", "_")
    return report_errors(lambda: importlib.import_module(f"dino.cli.{module}").main(words[1:]))


@contextmanager
def _cleaning_up_at_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM raises SystemExit(143): unfinished files are removed. A training handles it itself."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _escape_output() -> None:
    """Let streams escape what a terminal can't show: names from files may hold it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _describe_unknown(words: Sequence[str]) -> str:
    """What a first word that is no verb may mean."""
    word = printable(words[0], 100)
    verb = _OTHER_VERBS.get(words[0].lower(), nearest(words[0].lower().lstrip("-"), list(VERBS)))
    if verb:
        return f"no verb {word!r}; the nearest is {verb!r}"
    if words[0].startswith("-"):
        return f"no argument {word!r} before the verb: write dino VERB [arguments]"
    if os.path.exists(words[0]):
        return f"{word!r} is no verb: write dino VERB {word}, for example dino predict CHECKPOINT IMAGE"
    return f"no verb {word!r}; there are {', '.join(VERBS)}"


def report_errors(run: Callable[[], int | None]) -> int:
    """Call a program. Returns its exit code; prints an error that a person can correct as one line."""
    try:
        with _cleaning_up_at_sigterm():
            return run() or 0
    except BrokenPipeError:  # as of `dino weights | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush finds no pipe
        return 1
    except (UserError, FloatingPointError, OSError) as error:  # OSError: a full disk, a folder of somebody else
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ImportError as error:  # Detectron2 is missing, or a library of an extra
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:  # by a signal, after the checkpoint was written
        if stop.message:
            print(message_of(stop), file=sys.stderr)
        return stop.code
