"""The record of a run's evaluations: which weights are the best so far, and whether to stop early."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.utils.files import DataError, write_whole

from .metrics_file import is_number


class EvaluationRecord:
    """The evaluations of a run, in `evaluations.json` of its folder.

    Args:
        folder: of the run.
        period: iterations between evaluations; 0 for one at the end.
        metric: for the best weights, for example "bbox/AP"; of the raw or the averaged weights, whichever is better.
        mode: "max" or "min".
        patience: evaluations without a better metric before the training stops; 0: it never stops early.

    Raises:
        DataError: the settings make no sense.
    """

    def __init__(
        self, folder: str | Path, period: int, *, metric: str = "bbox/AP", mode: str = "max", patience: int = 0
    ):
        if mode not in ("max", "min"):
            raise DataError(f"train.best.mode={mode!r}: write max or min")
        if patience and not period:
            raise DataError("train.best.patience counts evaluations: set train.eval_epochs or train.eval_period")
        self.path = Path(folder) / "evaluations.json"
        self.period = period
        self.metric = metric
        self.sign = 1 if mode == "max" else -1
        self.patience = patience
        self.entries: list[dict] = []

    def read(self, completed: int) -> None:
        """Read the evaluations of the first `completed` iterations, which a resumed run continues.

        Raises:
            DataError: the file is damaged.
        """
        if completed and self.path.is_file():
            self.entries = [entry for entry in _read(self.path) if entry["iteration"] <= completed]

    def due(self, completed: int, length: int) -> bool:
        """Whether an evaluation before the last one belongs after so many of `length` iterations."""
        return bool(self.period) and 0 < completed < length and completed % self.period == 0

    def missed(self, completed: int, length: int) -> bool:
        """Whether an evaluation was due after so many iterations, and is not there."""
        return self.due(completed, length) and completed not in {entry["iteration"] for entry in self.entries}

    def note(self, completed: int, values: Mapping[str, float]) -> tuple[bool, bool]:
        """Add an evaluation -> whether its weights are the best so far, and whether to stop early.

        Args:
            completed: iterations.
            values: the metrics; those of averaged weights under `ema/…`.

        Raises:
            DataError: the metric was not measured.
        """
        if self.metric not in values:
            raise DataError(f"train.best.metric={self.metric!r} was not measured; there are {', '.join(values)}")
        numbers = {key: None if math.isnan(value) else value for key, value in values.items()}
        before = [entry for entry in self.entries if entry["iteration"] < completed]
        self.entries = [*before, {"iteration": completed, **numbers}]
        write_whole(self.path, lambda part: part.write_text(json.dumps(self.entries, indent=1) + "\n"))
        scores = [self._score(entry) for entry in self.entries]
        waited = len(scores) - 1 - scores.index(max(scores))
        return waited == 0 and math.isfinite(scores[-1]), bool(self.patience) and waited >= self.patience

    def describe_best(self) -> dict[str, Any]:
        """What `model_best.pth` says of the better weights of the last evaluation, which is the best one."""
        entry = self.entries[-1]
        value = self.sign * self._score(entry)
        kind = "averaged" if entry.get(f"ema/{self.metric}") == value else "raw"
        return {"weights": kind, "iteration": entry["iteration"] - 1, "metric": self.metric, "value": value}

    @property
    def reason_to_stop(self) -> str:
        """Why a training stops early."""
        return f"{self.patience} evaluations without a better {self.metric}: training stops early"

    @property
    def best_ap(self) -> float | None:
        """AP of the best weights in percent; None where they are the best in something else, or there are none."""
        scores = [self._score(entry) for entry in self.entries]
        known = self.metric == "bbox/AP" and scores and math.isfinite(max(scores))
        return self.sign * max(scores) if known else None

    def _score(self, entry: Mapping[str, Any]) -> float:
        """Score of the better of raw and averaged weights; higher is better."""
        values = [entry.get(key) for key in (self.metric, f"ema/{self.metric}")]
        return max((self.sign * value for value in values if value is not None), default=-math.inf)


def _read(path: Path) -> list[dict]:
    """The evaluations of a run: their iterations, and values that are numbers, or None where undefined.

    Raises:
        DataError: the file is damaged, or can't be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, list) or not all(map(_is_entry, record)):
            raise ValueError("it is no list of evaluations")
        return sorted(record, key=lambda entry: entry["iteration"])
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged: {str(error)[:200]}. Remove the file to continue without the best value so far"
        ) from error


def _is_entry(entry: object) -> bool:
    """Whether a part of the record holds an iteration, and values that are numbers, or None where undefined."""
    if not isinstance(entry, dict) or type(entry.get("iteration")) is not int:
        return False
    return all(value is None or is_number(value) for value in entry.values())
