"""Paths as people write them: `~`, a name that is nearly right, a folder for a file, the folder of a run."""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import sys
from pathlib import Path

from .files import DataError, UsageError
from .printable import printable

PICTURES = {".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
WEIGHTS = {".bin", ".pkl", ".pth", ".pt", ".safetensors"}
_BEST = ("model_best.pth", "model_final.pth")  # of a run, in this order
_NUMBERED = re.compile(r"model_(\d+)\.pth")
_LEAST = 0.65  # similarity of a name that is offered in place of a missing one
_MOST_NAMES = 5000  # of a folder that are compared


class PathError(DataError, UsageError):
    """A file or folder is not there, or is of another kind than the argument; the message names the likely one."""


def expand(path: str | os.PathLike) -> str:
    """The path with the home folder in place of a leading `~`."""
    text = os.fspath(path)
    return os.path.expanduser(text) if text == "~" or text.startswith(("~/", "~\\")) else text


def hint(path: str | os.PathLike, suffixes: set[str] | None = None) -> str:
    """What a path that is not there may stand for: `; the nearest there is …`, or "".

    Args:
        suffixes: endings of files that count, in lower case; None for folders; an empty set for everything.
    """
    wanted = Path(path)
    folder = wanted.parent
    while not os.path.isdir(folder) and folder != folder.parent:
        wanted, folder = folder, folder.parent  # the first part that is missing
    names = _names_in(folder, suffixes if wanted == Path(path) else None)
    stems = {Path(name).stem.lower(): name for name in sorted(names)}
    found = difflib.get_close_matches(wanted.stem.lower(), stems, 1, _LEAST)
    return f"; the nearest there is {printable(folder / stems[found[0]], 200)}" if found else ""


def _names_in(folder: Path, suffixes: set[str] | None) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry, _ in zip(entries, range(_MOST_NAMES), strict=False)]
            if suffixes is None:
                return [entry.name for entry in found if entry.is_dir()]
            return [entry.name for entry in found if not suffixes or Path(entry.name).suffix.lower() in suffixes]
    except OSError:
        return []


def find_file(path: str | os.PathLike, what: str, suffixes: set[str]) -> Path:
    """A file that must be there.

    Args:
        what: the noun of the message, such as annotations.
        suffixes: endings that it may have, for hints.

    Raises:
        PathError: it is missing or a folder; the message names a file beside it, or in it.
    """
    found = Path(expand(path))
    if os.path.isdir(found):
        inside = [name for name in sorted(_names_in(found, suffixes)) if not name.startswith(".")]
        near = f": name a file, such as {printable(found / inside[0], 200)}" if inside else ": name a file"
        raise PathError(f"{what} can't be the folder {printable(found, 200)}{near}")
    if not os.path.exists(found):
        raise PathError(f"{what} not found: {printable(found, 300)}{hint(found, suffixes)}")
    return found


def find_folder(path: str | os.PathLike, what: str) -> Path:
    """A folder that must be there.

    Raises:
        PathError: it is missing or a file; the message names a folder beside it, or its own.
    """
    found = Path(expand(path))
    if os.path.isfile(found):
        raise PathError(f"{what} can't be the file {printable(found, 200)}: name a folder, such as {found.parent}")
    if not os.path.isdir(found):
        raise PathError(f"{what} not found: {printable(found, 300)}{hint(found)}")
    return found


def find_data(annotations: str | os.PathLike, images: str | os.PathLike, *, before: str = "") -> tuple[str, str]:
    """Annotations and the folder of their images, both there.

    Args:
        before: what stands before them on the command line, for the message.

    Raises:
        PathError: they are swapped, missing, or a file for a folder and the reverse.
    """
    first, second = expand(annotations), expand(images)
    if os.path.isdir(first) and os.path.isfile(second) and second.lower().endswith(".json"):
        words = " ".join([before, *(shlex.quote(printable(path, 200)) for path in (second, first))]).strip()
        raise PathError(f"the annotations come before the images: write {words}")
    found = find_file(first, "annotations", {".json"})
    if found.suffix.lower() in WEIGHTS | PICTURES:
        raise PathError(f"annotations are a JSON file in COCO format, not {printable(found, 200)}")
    return str(found), str(find_folder(second, "image folder"))


def checkpoint_of_run(folder: Path) -> Path | None:
    """The checkpoint that stands for a run: the best one, else the final one, else the last; None without any."""
    there = [folder / name for name in (*_BEST, _last(folder)) if name and (folder / name).is_file()]
    numbered = [path for path in folder.glob("model_*.pth") if _NUMBERED.fullmatch(path.name) and path.is_file()]
    there += sorted(numbered, key=lambda path: int(_NUMBERED.fullmatch(path.name)[1]), reverse=True)
    return there[0] if there else None


def _last(folder: Path) -> str:
    """The file that `last_checkpoint` of a run names; "" for none, or a name that leads out of the folder."""
    try:
        with open(folder / "last_checkpoint", encoding="utf-8", errors="replace") as file:
            name = file.read(300).strip()
    except OSError:
        return ""
    return name if _NUMBERED.fullmatch(name) or name in _BEST else ""


@functools.cache
def say_once(text: str) -> None:
    """Print a line on stderr, once in a process."""
    print(printable(text, None), file=sys.stderr)
