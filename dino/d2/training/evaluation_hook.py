"""Evaluation during training: its record, the best weights, and early stopping."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext

from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from dino.d2.checkpoint import Checkpointer
from dino.training.ema import Ema
from dino.training.metrics_file import is_number
from dino.utils.files import DataError, write_whole

from .parallel import from_main
from .trainer import EndOfTraining

logger = logging.getLogger("detectron2.dino")


class Evaluation(hooks.EvalHook):
    """Detectron2's EvalHook with a record, the best weights and early stopping.

    The record is `evaluations.json`, the best weights are `model_best.pth`. A resumed run continues the record, and
    first repeats an interrupted evaluation.

    Args:
        period: iterations between evaluations; 0 for one at the end.
        evaluate: () -> results, on the main process; those of averaged weights under the key "ema".
        checkpointer: writes the best weights.
        ema: the averaged weights, or None.
        metric: for the best weights, for example "bbox/AP"; of the raw or the averaged weights, whichever is better.
        mode: "max" or "min".
        patience: evaluations without a better metric before the training stops; 0: it never stops early.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict],
        checkpointer: Checkpointer,
        ema: Ema | None,
        *,
        metric: str = "bbox/AP",
        mode: str = "max",
        patience: int = 0,
    ):
        super().__init__(period, self.run)
        if mode not in ("max", "min"):
            raise DataError(f"train.best.mode={mode!r}: write max or min")
        if patience and not period:
            raise DataError("train.best.patience counts evaluations: set train.eval_epochs or train.eval_period")
        self.period = period
        self.evaluate = evaluate
        self.checkpointer = checkpointer
        self.ema = ema
        self.metric = metric
        self.sign = 1 if mode == "max" else -1
        self.patience = patience
        self.path = os.path.join(checkpointer.save_dir, "evaluations.json")
        self.record: list[dict] = []  # of the main process
        self.completed = 0  # iterations

    def before_train(self) -> None:
        """Read the record, and repeat an evaluation that the previous run missed."""
        self.completed = start = self.trainer.start_iter
        if comm.is_main_process() and start and os.path.isfile(self.path):
            self.record = [entry for entry in _read_record(self.path) if entry["iteration"] <= start]
        if from_main(self._due_at(start) and start not in {entry["iteration"] for entry in self.record}):
            logger.info(f"evaluating the weights of iteration {start}: the interrupted run did not")
            self._do_eval()

    def _due_at(self, iteration: int) -> bool:
        """Whether an evaluation before the last one belongs after so many iterations."""
        if not self.period or not 0 < iteration < self.trainer.max_iter:
            return False
        return iteration % self.period == 0

    def after_step(self) -> None:
        """Evaluate if it is due; `after_train` does the last evaluation."""
        self.completed = self.trainer.iter + 1
        super().after_step()

    def after_train(self) -> None:
        """Evaluate at the end of a training that ran to its last iteration."""
        if self.trainer.iter >= self.trainer.max_iter:
            self.completed = self.trainer.max_iter
            super().after_train()

    def run(self) -> dict:
        """Evaluate, record, save the best weights -> results."""
        results = self.evaluate()
        improved = stop = False
        if comm.is_main_process() and results:  # none where the data have no annotations
            improved, stop = self.note(flatten_results_dict(results))
        improved, stop = from_main((improved, stop))
        if improved:
            self.save_best()
        if stop and self.completed < self.trainer.max_iter:
            logger.info(f"{self.patience} evaluations without a better {self.metric}: training stops early")
            raise EndOfTraining
        return results

    def note(self, values: dict[str, float]) -> tuple[bool, bool]:
        """Add to the record -> whether the weights are the best so far, and whether to stop early."""
        if self.metric not in values:
            raise DataError(f"train.best.metric={self.metric!r} was not measured; there are {', '.join(values)}")
        numbers = {key: None if math.isnan(value) else value for key, value in values.items()}
        before = [entry for entry in self.record if entry["iteration"] < self.completed]
        self.record = [*before, {"iteration": self.completed, **numbers}]
        write_whole(self.path, lambda part: part.write_text(json.dumps(self.record, indent=1) + "\n"))
        scores = [self.score(entry) for entry in self.record]
        best = scores.index(max(scores))
        waited = len(scores) - 1 - best
        return waited == 0 and math.isfinite(scores[-1]), bool(self.patience) and waited >= self.patience

    def score(self, entry: dict) -> float:
        """Score of the better of raw and averaged weights; higher is better."""
        values = [entry.get(key) for key in (self.metric, f"ema/{self.metric}")]
        return max((self.sign * value for value in values if value is not None), default=-math.inf)

    def save_best(self) -> None:
        """Write the weights alone: `model_best.pth` is for prediction, not for resuming."""
        entry = from_main(self.record[-1] if self.record else None)
        value, averaged = self.sign * self.score(entry), entry.get(f"ema/{self.metric}")
        kind = "averaged" if averaged == value else "raw"
        with self.ema.applied() if self.ema and kind == "averaged" else nullcontext():
            self.checkpointer.save_weights(
                "model_best", weights=kind, iteration=self.completed - 1, metric=self.metric, value=value
            )
        logger.info(f"best {self.metric} so far: {value:.4f}, {kind} weights, in model_best.pth")


def _read_record(path: str) -> list[dict]:
    """The evaluations of a run: their iterations, and values that are numbers, or None where undefined.

    Raises:
        DataError: the file is damaged, or can't be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
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
