"""Errors that a person can fix, and files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from .printable import printable


class UserError(ValueError):
    """A flag, a setting, a disk or a missing library stops the program; the message says what to do."""


class DataError(UserError):
    """A data set, an image or a checkpoint can't be used; the message names the file and says what to do."""


class UsageError(UserError):
    """A mistyped argument or key; the message names the nearest right form. The exit code is 2."""


def message_of(error: BaseException) -> str:
    """The text of an error for a terminal, without the traceback that a data loader's worker puts around it."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rstrip().rpartition(f"{type(error).__name__}: ")[2]
    return printable(text, None, kept="\n\t")  # names from files can hold control characters


def counted(number: int, thing: str, things: str = "") -> str:
    """A number and its noun, such as "1 picture" or "2,000 pictures"; `things` is an irregular plural."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def resolve_inside(folder: str | Path, file_name: str) -> Path:
    """`folder / file_name`, checked to lie inside the folder.

    Raises:
        DataError: the name is empty, absolute, or leads out of the folder.
    """
    pure = PurePosixPath(file_name)
    leads_out = ".." in pure.parts or ".." in PureWindowsPath(file_name).parts
    if not file_name or pure.is_absolute() or PureWindowsPath(file_name).is_absolute() or leads_out:
        raise DataError(f"file_name {file_name!r} leaves the image folder {folder}: write it relative to that folder")
    return Path(folder) / pure


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then move it to `path`: the file appears whole or not at all.

    Args:
        path: the file to write or replace.
        write: writes the content to the path that it gets.

    Raises:
        UserError: the disk is full, or the folder can't be written. The old content of `path` stays.
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
        full = f"the disk is full, or the file is too large for its file system ({error})"
        raise UserError(f"can't write {path}: {error if isinstance(error, OSError) else full}") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless it exists.

    Raises:
        UserError: the folder can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make the folder {path}: {error}") from error


def free_name(path: Path) -> Path:
    """`path` if nothing is there, else the first free of `path.1`, `path.2`, …"""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
