"""Errors that a person can fix, and files that are written whole or not at all."""

from __future__ import annotations

import io
import os
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .printable import printable

_PART = re.compile(r"(.+)\.[0-9a-f]{8}\.part")  # name of an unfinished file, see `make_part`
_NAME_BYTES = 64  # every file system allows names of so many


class UserError(ValueError):
    """A flag, a setting, a disk or a missing library stops the program; the message says what to do."""


class DataError(UserError):
    """A data set, an image or a checkpoint can't be used; the message names the file and says what to do."""


class UsageError(UserError):
    """A mistyped argument or key; the message names the nearest right form. The exit code is 2."""


class Stopped(Exception):
    """A signal has stopped a run that can be continued; raised after its checkpoint was written.

    Args:
        code: exit code of the program, 130 after Ctrl-C, 143 after SIGTERM.
        message: printed at the end of the program; "" for none.
    """

    def __init__(self, code: int, message: str = ""):
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


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
    _write(Path(path), write, os.replace)


def write_new(path: str | Path, write: Callable[[Path], object]) -> None:
    """As `write_whole`, for a file that must not exist, not even since a moment ago.

    Raises:
        UserError: the file exists; see `write_whole`.
    """
    _write(Path(path), write, _move_to_new)


def _move_to_new(part: Path, path: Path) -> None:
    """Give a file another name, which no file has."""
    taken = UserError(f"{path} exists: choose another name, or move it away")
    try:
        os.link(part, path)
    except FileExistsError:
        raise taken from None
    except OSError:  # a file system without links
        if path.exists():
            raise taken from None
        os.replace(part, path)


def _write(path: Path, write: Callable[[Path], object], move: Callable[[Path, Path], object]) -> None:
    part = None
    try:
        part = make_part(path)
        mode = part.stat().st_mode
        write(part)
        if part.stat().st_mode != mode:  # safetensors makes files that nobody else can read
            part.chmod(mode)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        move(part, path)
    except RuntimeError as error:  # torch.save reports a full disk so
        full = f"the disk is full, or the file is too large for its file system ({error})"
        raise UserError(f"can't write {path}: {full}") from error
    except OSError as error:  # without its file name, which is the temporary one
        reason = OSError(error.errno, error.strerror) if error.filename else error
        raise UserError(f"can't write {path}: {reason}") from error
    finally:
        if part:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_picture(path: str | Path, picture: Any, **options: Any) -> None:
    """Write one of Pillow's images whole, see `write_whole`.

    The file is encoded in memory first: Pillow writes JPEG without noticing that a full disk takes less than it gets.

    Args:
        path: the file to write or replace.
        picture: a `PIL.Image.Image`.
        options: of its `save`; `format` is needed.
    """
    encoded = io.BytesIO()
    picture.save(encoded, **options)
    write_whole(path, lambda part: part.write_bytes(encoded.getbuffer()))


def make_part(path: Path, suffix: str = ".part") -> Path:
    """Make an empty temporary file beside `path`: NAME.01234567.part.

    No other program uses its name, which is no longer than file systems allow.

    Args:
        path: the file that is to be written.
        suffix: of the temporary name.

    Raises:
        OSError: the folder can't be written.
    """
    while True:
        end = f".{secrets.token_hex(4)}{suffix}"
        longest = max(len(os.fsencode(path.name)), _NAME_BYTES) - len(end)
        part = path.with_name(os.fsencode(path.name)[:longest].decode(errors="ignore") + end)
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return part
        except FileExistsError:
            continue


def finished_name(name: str) -> str:
    """The name that a file of `make_part` was to get; "" for the name of any other file."""
    match = _PART.fullmatch(name)
    return match[1] if match else ""


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
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def make_free_folder(path: Path) -> Path:
    """Make a folder of a free name, see `free_name`; of several programs at once, each makes one of its own.

    Raises:
        UserError: the folder can't be made.
    """
    while True:
        free = free_name(path)
        try:
            free.mkdir(parents=True)
            return free
        except FileExistsError:  # another program was faster
            continue
        except OSError as error:
            raise UserError(f"can't make the folder {free}: {error}") from error


def clean_up(function: Callable[..., object], *args: Any) -> None:
    """Call `function(*args)` at the end of something; after an error, errors of the function do not hide it."""
    error = sys.exception()
    try:
        function(*args)
    except Exception:
        if error is None:
            raise
