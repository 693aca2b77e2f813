"""A loader and an evaluator that write down when they worked, in processor time of their process.

A recipe that names them is trained by the ordinary program; afterwards `read_clock` tells training from evaluation.
Data are read in the same process (`num_workers=0`), so its processor time is all that the training takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dino.d2.data_loading import Evaluator
from dino.d2.training.sampler import TrainLoader

FIRST_STEPS = 5  # iterations that are slower than the others


class Point(NamedTuple):
    """An evaluation: completed iterations, and processor seconds of start and training before it."""

    iteration: int
    training_seconds: float


class ClockRecord(NamedTuple):
    """Processor seconds of a run.

    Args:
        points: its evaluations.
        evaluation_seconds: of all evaluations together.
        start_seconds: from the start of the program until the first batch was read.
        step_seconds: mean of an iteration, without the first ones; None for fewer iterations.
    """

    points: list[Point]
    evaluation_seconds: float
    start_seconds: float
    step_seconds: float | None


class ClockedLoader(TrainLoader):
    """A `TrainLoader` that notes each batch.

    Args:
        clock: the file of the notes.
    """

    def __init__(self, dataset, mapper, *, clock: str, **options):
        super().__init__(dataset, mapper, **options)
        self.clock = clock

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield the batches."""
        for batch in super().__iter__():
            _note(self.clock, "batch")
            yield batch


class ClockedEvaluator(Evaluator):
    """An `Evaluator` that notes its construction, before the first image, and the end of its work.

    Args:
        clock: the file of the notes.
    """

    def __init__(self, dataset_name: str, *, clock: str, **options):
        _note(clock, "begin")
        self.clock = clock
        super().__init__(dataset_name, **options)

    def evaluate(self, *args, **options) -> dict:
        """The metrics."""
        result = super().evaluate(*args, **options)
        _note(self.clock, "end")
        return result


def _note(path: str, event: str) -> None:
    with open(path, "a") as file:
        file.write(json.dumps([event, time.process_time()]) + "\n")


def read_clock(path: Path) -> ClockRecord:
    """Read the notes of a whole run.

    Raises:
        OSError, ValueError: the file is missing or damaged, or the run was never evaluated.
    """
    points, batches, evaluation, begun = [], [], 0.0, 0.0
    for line in path.read_text().splitlines():
        event, seconds = json.loads(line)
        if event == "batch":
            batches.append(seconds - evaluation)
        elif event == "end":
            evaluation += seconds - begun
        else:
            begun = seconds
            if not points or points[-1].iteration != len(batches):  # else of the averaged weights, after the raw ones
                points.append(Point(len(batches), seconds - evaluation))
    if not batches or not points:
        raise ValueError(f"{path} notes no training that was evaluated")
    steps = batches[FIRST_STEPS:]
    step = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else None
    return ClockRecord(points, evaluation, batches[0], step)
