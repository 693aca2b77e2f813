"""Read the configuration files of the official program as data: nothing of them is executed."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dino.utils.files import DataError, UsageError, resolve_inside
from dino.utils.paths import find_file
from dino.utils.printable import printable

_MOST_BYTES = 1 << 20  # of a file; the official ones have 3 KB
_MOST_FILES = 20  # of one configuration; the official ones have two
_BASE = "_base_"
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a configuration file of the official program, with those that it names as `_base_`.

    Args:
        path: a .py file, whose statements must be NAME = VALUE with plain values, or the config_args_all.json of a run.
            Bases must lie in the folder of the file, or below it.

    Returns:
        key -> value; a file's own values replace those of its bases.

    Raises:
        PathError: there is no such file, or it is of another kind.
        DataError: it holds anything but plain values; a key stands twice; a base is missing, lies elsewhere or leads
            back to a file that names it. The message names file, line and key.
    """
    file = find_file(path, "configuration file", {".py", ".json"})
    return _read_json(file) if file.suffix.lower() == ".json" else _read_python(file, file.parent, (), [])


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE as the official program's --options: numbers, true, false, none, text; commas make a list.

    Lists in brackets, which that program does not read, mean what they say.

    Raises:
        UsageError: a word is not of this form.
    """
    options = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--options takes KEY=VALUE, not {printable(word, 100)!r}")
        options[key] = _parse_value(key, text)
    return options


def _parse_value(key: str, text: str) -> Any:
    """The value of an option.

    Raises:
        UsageError: brackets without plain values in them.
    """
    if text[:1] in ("[", "("):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UsageError(f"--options {key}={printable(text, 100)}: a list of plain values was expected") from None
        return list(value) if isinstance(value, tuple) else value
    values = [_parse_word(word) for word in text.split(",")]
    return values if len(values) > 1 else values[0]


def _parse_word(word: str) -> Any:
    """A number, a truth value, None or text."""
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return _WORDS.get(word.lower(), word)


def _read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it is too large, or no text.
    """
    if not path.is_file():  # reading a pipe would wait for a writer
        raise DataError(f"{_shown(path)} is no regular file")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise DataError(f"{_shown(path)} is larger than 1 MB: no configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{_shown(path)} is no text in UTF-8") from None


def _read_python(path: Path, folder: Path, above: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """The settings of a file and of its bases.

    Args:
        folder: which must hold all bases.
        above: the files that lead here by `_base_`. read: all files so far; this one is added.
    """
    real = path.resolve()
    if real in above:
        raise DataError(f"{_shown(path)}: its {_BASE} leads back to itself, through {_shown(above[-1])}")
    read.append(real)
    if len(read) > _MOST_FILES:
        raise DataError(f"{_shown(path)}: more than {_MOST_FILES} files are named by {_BASE}")
    own, lines = _assignments(path)
    bases = own.pop(_BASE, [])
    where = f"{_shown(path)}, line {lines.get(_BASE)}"
    settings: dict[str, Any] = {}
    for name in bases if isinstance(bases, list) else [bases]:
        found = _read_python(_find_base(where, name, path, folder), folder, (*above, real), read)
        twice = sorted(settings.keys() & found.keys())
        if twice:
            raise DataError(f"{where}: {printable(twice[0])} stands in two files of {_BASE}")
        settings |= found
    return settings | own


def _find_base(where: str, name: Any, path: Path, folder: Path) -> Path:
    """The file that a `_base_` of the file `path` names.

    Raises:
        DataError: it is no name, or lies outside of the folder, or is not there.
    """
    if not isinstance(name, str):
        raise DataError(f"{where}: {_BASE} must name files, not {printable(name)}")
    try:
        base = resolve_inside(path.parent, name)
        inside = base.resolve().is_relative_to(folder.resolve())
    except ValueError:  # also of a NUL in the name
        inside = False
    if not inside:
        raise DataError(
            f"{where}: {_BASE} = {printable(name)!r} leaves the folder {_shown(folder)}: put a copy of that file into "
            "the folder, and name it there"
        )
    if not base.is_file() or base.suffix != ".py":
        raise DataError(f"{where}: {_BASE} = {printable(name)!r} is no Python file in {_shown(path.parent)}")
    return base


def _assignments(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a file's own statements, and the line of each key.

    Raises:
        DataError: a statement is anything but NAME = VALUE with a plain value, or a key stands twice.
    """
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for statement in _parse(path).body:
        where = f"{_shown(path)}, line {statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        key = _target(statement)
        if key is None:
            raise DataError(
                f"{where}: only NAME = VALUE is read, as in the official program's files, and nothing is executed"
            )
        if key in values:
            raise DataError(f"{where}: {printable(key)} is set a second time, first in line {lines[key]}")
        try:
            values[key] = _as_lists(ast.literal_eval(statement.value))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise DataError(
                f"{where}: the value of {printable(key)} is no plain number, text, list or dict: write its result"
            ) from None
        lines[key] = statement.lineno
    return values, lines


def _parse(path: Path) -> ast.Module:
    """The statements of a file.

    Raises:
        DataError: it is no Python.
    """
    text = _read_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        syntax = isinstance(error, SyntaxError)
        line = f", line {error.lineno}" if syntax and error.lineno else ""
        reason = (error.msg if syntax else str(error)) or "nested too deeply"
        raise DataError(f"{_shown(path)}{line}: no Python: {printable(reason, 100)}") from None


def _target(statement: ast.stmt) -> str | None:
    """The name that a statement NAME = VALUE sets; None for other statements."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target = statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None


def _as_lists(value: Any) -> Any:
    """A value with lists in place of tuples."""
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _read_json(path: Path) -> dict[str, Any]:
    """The settings in a config_args_all.json.

    Raises:
        DataError: it is no JSON object, a key stands twice, or it holds the arguments without the configuration.
    """
    try:
        content = json.loads(_read_text(path), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{_shown(path)} is no JSON: {printable(error, 100)}") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{_shown(path)} holds no settings: a JSON object was expected")
    if "config_file" in content and "modelname" not in content:
        raise DataError(
            f"{_shown(path)} holds the arguments of the program alone: give the config_args_all.json of the same folder"
        )
    return dict(content)


def _unique(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{_shown(path)}: {printable(twice)} stands twice")
    return found


def _shown(path: Path) -> str:
    return printable(path, 200)
