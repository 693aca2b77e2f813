"""What the verbs check before any library is loaded: paths of the right kind in the right order, missing packages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dino.utils.files import UserError
from dino.utils.paths import PICTURES, WEIGHTS, PathError, expand
from dino.utils.printable import printable

_NAMES = {"cv2": "OpenCV (cv2)"}  # of modules, as people know them
_OTHERS = PICTURES | {".json", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".onnx"}  # ends of files that are no checkpoint


def check_order(word: str, *rest: str, before: str) -> None:
    """Refuse other files in place of the checkpoint.

    Args:
        word: the checkpoint of a command line. rest: the arguments after it.
        before: the words of the command before it.

    Raises:
        PathError: the checkpoint stands in another argument's place.
    """
    swapped = next((other for other in rest if Path(other).suffix.lower() in WEIGHTS), None)
    if swapped and (Path(word).suffix.lower() in _OTHERS or Path(word).is_dir()):
        others = [swapped, word, *(other for other in rest if other != swapped)]
        raise PathError(f"the checkpoint comes first: write {before} {' '.join(printable(o, 200) for o in others)}")


def find_checkpoint(word: str) -> str:
    """The checkpoint of a command line: the word itself; for the folder of a run, the file in it.

    Args:
        word: a file, a folder, an address or a name.

    Raises:
        PathError: it is not there, or is no checkpoint.
    """
    from dino.weights.addresses import locate
    from dino.weights.published import find

    if "://" in word or (find(word) and not Path(word).exists()):
        return word  # is fetched when it is read
    return locate(word)


def check_output(folder: str) -> None:
    """Look whether a folder can be made and written, as far as its parents show.

    Raises:
        UserError: it can't.
    """
    path = Path(os.path.abspath(expand(folder)))
    place = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not os.path.isdir(place):
        raise PathError(f"can't write into {printable(folder, 300)}: {printable(place, 200)} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"can't write into {printable(folder, 300)}: no permission to write into {place}")


def need(modules: Sequence[str], purpose: str, install: str) -> None:
    """Look for libraries before the work that needs them.

    Args:
        modules: what is imported.
        install: the argument of `pip install` that brings them.

    Raises:
        UserError: one is missing.
    """
    missing = [_NAMES.get(name, name) for name in modules if not is_installed(name)]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}: pip install {install}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a test hides it
        return False


def join_pairs(split: str, new: Sequence[str] | None, old: Sequence[str | None]) -> tuple[str | None, str | None]:
    """Annotations and images of one split: of `--split ANNOTATIONS IMAGES`, or of the two old flags.

    Raises:
        UserError: one of a pair is missing, or both forms are used.
    """
    if new and any(old):
        raise PathError(f"--{split} and --{split}-json are two forms of one argument: write --{split} alone")
    pair = tuple(new or old)
    if any(pair) and not all(pair):
        raise PathError(f"--{split}-json and --{split}-images belong together: give both")
    return pair
