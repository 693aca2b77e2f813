"""The console command `dino`: one table of verbs, each of which is imported when it is called."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import dino
from dino.utils.files import UserError, message_of

for message in (".*torch.jit.*is deprecated.*", ".*pkg_resources is deprecated.*", ".*broadcast_buffers.*"):
    warnings.filterwarnings("ignore", message=message)  # of Detectron2 itself; must come before its import


class Verb(NamedTuple):
    """A verb: the module whose `main(argv) -> exit code or None` does the work, and what that is, in a line.

    Its parser calls itself `dino <verb>`, has an example under `--help`, and raises a DataError for what a person can
    put right.
    """

    module: str
    help: str


VERBS = {
    "train": Verb("dino.d2.training.launch", "train a recipe, on COCO-format files or a registered data set"),
    "eval": Verb("dino.evaluation.report.evaluate", "AP, curves, confusions and the worst images in one report.html"),
    "predict": Verb(
        "dino.inference.predict_files", "draw what a checkpoint finds in images, folders, videos or a webcam"
    ),
    "check": Verb("dino.data.check.check_dataset", "look a data set over before training"),
    "export": Verb("dino.export.export_checkpoint", "a checkpoint as ONNX, TorchScript or a program of torch.export"),
    "explain": Verb("dino.explain.explain_batch", "pictures of what a checkpoint does with a training batch"),
    "convert": Verb("dino.weights.conversion", "checkpoints of other DINO programs to and fro"),
    "env": Verb("dino.cli.env", "what a bug report needs, and which attention operator runs"),
}


def usage() -> str:
    """The text of `dino --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: dino VERB [arguments]\n\nDINO for Detectron2, version {dino.__version__}\n\n{verbs}\n\n"
        "example:\n  dino check train.json images\n`dino VERB --help` shows the arguments of a verb and examples."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, 1 for an error that is told in one line, 2 for a wrong command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names from files may hold what a terminal can't show
    if words in (["--version"], ["-V"]):
        print(f"dino {dino.__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in VERBS:
        print(f"error: no verb {words[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return guard(lambda: importlib.import_module(VERBS[words[0]].module).main(words[1:]))


def guard(run: Callable[[], int | None]) -> int:
    """Call a program. Returns its exit code, or that of an error, which is told in one line."""
    try:
        return run() or 0
    except (UserError, FloatingPointError, OSError) as error:  # OSError: a full disk, a folder that is not ours
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 1
    except ImportError as error:  # Detectron2 is missing, or a library of an extra
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
