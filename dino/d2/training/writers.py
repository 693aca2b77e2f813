"""Writers of training metrics beyond Detectron2's: console, Weights & Biases, curves."""

from __future__ import annotations

import datetime
from collections import defaultdict
from pathlib import Path

import torch
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage

from dino.layers.matching_metrics import MatchingMetrics
from dino.training.curves import draw_curves
from dino.training.metrics_file import append_metrics, forget_metrics
from dino.utils.files import DataError, write_whole

__all__ = ["ConsoleWriter", "MetricsWriter", "WandbWriter", "draw_curves", "forget_metrics"]

_SHOWN = ("total_loss", "loss_ce", "loss_bbox", "loss_giou", *MatchingMetrics.NAMES, "lr")


class ConsoleWriter(CommonMetricPrinter):
    """One short line: total loss and the three main terms. All 39 losses go to metrics.json and TensorBoard."""

    _printed = -1  # iteration of the last line

    def write(self) -> None:
        """Print one line from the event storage."""
        storage = get_event_storage()
        histories = storage.histories()
        if storage.iter >= self._max_iter or storage.iter == self._printed or not histories:
            return
        self._printed = storage.iter
        self.logger.info("  ".join([f"iter {storage.iter}/{self._max_iter}", *self._parts(storage.iter, histories)]))

    def _parts(self, iteration: int, histories: dict) -> list[str]:
        """Losses, times, learning rate, remaining time and memory, as far as they are known."""
        latest = {name: histories[name].latest() for name in _known(histories, *_SHOWN)}
        times = {name: histories[name].median(self._window_size) for name in _known(histories, "time", "data_time")}
        parts: list[str] = []
        parts += [f"{name} {value:.3f}" for name, value in latest.items() if name != "lr"]
        parts += [f"{name} {value:.3f} s" for name, value in times.items()]
        parts += [f"lr {latest['lr']:.2e}"] if "lr" in latest else []
        if "time" in times:
            parts.append(f"eta {datetime.timedelta(seconds=int(times['time'] * (self._max_iter - iteration - 1)))}")
        if torch.cuda.is_available():
            parts.append(f"memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        return parts


def _known(histories: dict, *names: str) -> list[str]:
    """Those of the names that the event storage holds."""
    return [name for name in names if name in histories]


class MetricsWriter(EventWriter):
    """Writes metrics.json, as Detectron2's JSONWriter does.

    (That one leaves out an evaluation in the iteration of a checkpoint: it writes an iteration once, and metrics are
    written before each checkpoint.)

    Args:
        path: of the file, which grows.
        window: iterations over which values are averaged.
    """

    def __init__(self, path: str, window: int):
        self.path = path
        self.window = window
        self.written: dict[str, int] = {}  # the last iteration of each value

    def write(self) -> None:
        """Append the new values of the event storage.

        Raises:
            UserError: the disk is full.
        """
        new = defaultdict(dict)
        for key, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self.window).items():
            if iteration > self.written.get(key, -1):
                self.written[key] = iteration
                new[iteration][key] = value
        for iteration in sorted(new):
            append_metrics(self.path, {"iteration": iteration, **new[iteration]})


class WandbWriter(EventWriter):
    """Sends all metrics and the images of the run folder to Weights & Biases; a resumed run continues the same one.

    Args:
        output_dir: folder of the run; holds its id.
        config: plain data to show with the run.
        project, name: as of wandb.init.

    Raises:
        DataError: wandb is not installed.
    """

    def __init__(self, output_dir: str, config: dict, *, project: str, name: str | None = None):
        try:
            import wandb
        except ImportError as error:
            raise DataError("train.wandb.enabled=True needs wandb: pip install wandb") from error
        self.wandb = wandb
        self.folder = Path(output_dir)
        self.sent: set[tuple] = set()  # (key, iteration), and images
        known = self.folder / "wandb_id"
        run_id = known.read_text().strip() if known.is_file() else None
        self.run = wandb.init(project=project, name=name, dir=output_dir, id=run_id, resume="allow", config=config)
        write_whole(known, lambda part: part.write_text(self.run.id))

    def write(self) -> None:
        """Send new metrics and images."""
        new = defaultdict(dict)
        for key, (value, iteration) in get_event_storage().latest().items():
            if (key, iteration) not in self.sent:
                self.sent = {entry for entry in self.sent if entry[0] != key} | {(key, iteration)}
                new[iteration][key] = value
        for path in sorted(self.folder.glob("*.png")):
            stamp = ("picture", path.name, path.stat().st_mtime_ns)
            if stamp not in self.sent:
                self.sent.add(stamp)
                new[max(new, default=get_event_storage().iter)][path.stem] = self.wandb.Image(str(path))
        for iteration in sorted(new):
            self.run.log(new[iteration], step=iteration)

    def close(self) -> None:
        """End the run."""
        self.run.finish()
