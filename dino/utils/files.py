"""Files that people give and files that are written for them: faults are named, and nothing is lost or half there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath


class UserError(ValueError):
    """A flag, a setting, a disk or a missing library stops the program; the message says what to do."""


class DataError(UserError):
    """A data set, an image or a checkpoint can't be used; the message names the file and says what to do."""


def message_of(error: BaseException) -> str:
    """What to tell a person: the text of an error, without the traceback that a data loader's worker puts around it."""
    text = str(error)
    return text.rstrip().rpartition(f"{type(error).__name__}: ")[2] if "Original Traceback" in text else text


def counted(number: int, thing: str, things: str = "") -> str:
    """Such as "1 picture", "2,000 pictures"; `things`: the plural, where that is not `thing` with an s."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def resolve_inside(folder: str | Path, file_name: str) -> Path:
    """`folder / file_name`, if that lies inside the folder.

    Raises:
        DataError: the name is absolute, empty, or climbs out of the folder.
    """
    pure = PurePosixPath(file_name)
    climbs = ".." in pure.parts or ".." in PureWindowsPath(file_name).parts
    if not file_name or pure.is_absolute() or PureWindowsPath(file_name).is_absolute() or climbs:
        raise DataError(f"file_name {file_name!r} leaves the image folder {folder}: write it relative to that folder")
    return Path(folder) / pure


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, then put it in the place of `path`: it appears whole or not at all.

    Raises:
        DataError: the disk is full, or the folder can't be written; what `path` held before is untouched.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        reason = (
            error if isinstance(error, OSError) else f"the disk is full, or that is too large a file for it ({error})"
        )
        raise DataError(f"can't write {path}: {reason}") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        DataError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"can't make the folder {path}: {error}") from error


def free_name(path: Path) -> Path:
    """`path` if nothing is there, else `path.1`, `path.2` … whichever is free first."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
