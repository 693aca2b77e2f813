"""Evaluation during training: its record, the best weights, and early stopping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from dino.d2.checkpoint import Checkpointer
from dino.training.ema import Ema
from dino.training.evaluation_record import EvaluationRecord
from dino.training.run_log import show
from dino.training.start_summary import best_line

from .parallel import from_main
from .trainer import EndOfTraining


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
        self.evaluate = evaluate
        self.checkpointer = checkpointer
        self.ema = ema
        options = {"metric": metric, "mode": mode, "patience": patience}
        self.record = EvaluationRecord(checkpointer.save_dir, period, **options)  # filled on the main process
        self.completed = 0  # iterations

    def before_train(self) -> None:
        """Read the record, and repeat an evaluation that the previous run missed."""
        self.completed = start = self.trainer.start_iter
        if comm.is_main_process():
            self.record.read(start)
        if from_main(self.record.missed(start, self.trainer.max_iter)):
            show([f"evaluating the weights of iteration {start}: the interrupted run did not"])
            self._do_eval()

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
            improved, stop = self.record.note(self.completed, flatten_results_dict(results))
        improved, stop = from_main((improved, stop))
        if improved:
            self.save_best()
        if stop and self.completed < self.trainer.max_iter:
            show([self.record.reason_to_stop])
            raise EndOfTraining
        return results

    def save_best(self) -> None:
        """Write the weights alone: `model_best.pth` is for prediction, not for resuming."""
        about = from_main(self.record.describe_best() if comm.is_main_process() else None)
        with self.ema.applied() if self.ema and about["weights"] == "averaged" else nullcontext():
            self.checkpointer.save_weights("model_best", **about)
        show([best_line(about["metric"], about["value"], about["weights"])])
