"""metrics.json: a line for each logged iteration. A kill can cut its last line short."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dino.utils.files import UserError, write_whole


def read_metrics(path: str | Path) -> list[dict]:
    """The entries of a metrics.json, each with an integer "iteration"; damaged lines are left out.

    No file, no entries.

    Raises:
        UserError: the file can't be read.
    """
    path, found = Path(path), []
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        raise UserError(f"can't read {path}: {error}") from error
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("iteration")) is int:
            found.append(entry)
    return found


def is_number(value: object) -> bool:
    """Whether a value of an entry is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def forget_metrics(path: str | Path, start: int) -> dict[int, float]:
    """Remove the metrics of iterations from `start` on, where a resumed run continues -> the total losses before.

    An evaluation after `start` iterations stays.
    """
    kept = [
        x for x in read_metrics(path) if x["iteration"] < start or (x["iteration"] == start and "total_loss" not in x)
    ]
    if Path(path).is_file():
        write_whole(path, lambda part: part.write_text("".join(map(_line, kept))))
    return {x["iteration"]: x["total_loss"] for x in kept if is_number(x.get("total_loss"))}


def append_metrics(path: str | Path, values: Mapping[str, float]) -> None:
    """Append one entry; it must hold "iteration".

    Raises:
        UserError: the disk is full, or the file can't be written.
    """
    try:
        with open(path, "ab") as file:
            file.write(_line(values).encode())
    except OSError as error:
        raise UserError(f"can't write {path}: {error}") from error


def _line(values: Mapping) -> str:
    return json.dumps(dict(values), sort_keys=True) + "\n"
