"""What a training prints at its start, after each evaluation and at its end. Both engines print these lines."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino.utils.files import counted
from dino.utils.printable import printable

MOST_LINES = 25  # of `start_lines`
_WIDTH = 110
_COLUMN = 11  # width of the labels
_MOST_CLASSES = 10  # whose numbers are shown
_METRICS = ("AP", "AP50", "AP75")
_TIED = "\xa0"  # a space at which no line breaks


class Split(NamedTuple):
    """The training or the validation data.

    Args:
        images: number of images.
        empty: number of images without objects.
        objects: number of objects of each class, by its name.
    """

    images: int
    empty: int
    objects: Mapping[str, int]


class Plan(NamedTuple):
    """How the training runs.

    Args:
        batch: images of a step.
        iterations: length of the training.
        per_epoch: iterations of an epoch; 0 where it is unknown.
        eval_period: iterations between evaluations; 0 for one at the end.
        rates: learning rates and what they are of, for example {"backbone": 1e-5, "the rest": 1e-4}.
        precision: of the forward pass, for example "bfloat16".
        device: "cpu", "cuda", …, with the number of processes if there are several.
        operator: which form of the attention operator runs, see `dino.layers.ops.operator_report`.
        start: completed iterations, more than 0 in a resumed run.
        tensorboard: the run writes files for it.
    """

    batch: int
    iterations: int
    per_epoch: int
    eval_period: int
    rates: Mapping[str, float]
    precision: str
    device: str
    operator: str
    start: int = 0
    tensorboard: bool = False


def start_lines(
    recipe: str,
    train: Split,
    val: Split,
    sizes: np.ndarray,
    plan: Plan,
    weights: str,
    folder: str | Path,
    warnings: Sequence[str] = (),
) -> list[str]:
    """At most MOST_LINES lines to print before the first iteration.

    Args:
        recipe: name or file.
        train, val: the data.
        sizes: (N,) square roots of the areas of training objects after the resize, in pixels.
        plan: how the training runs.
        weights: one line, for example `Report.summary` with the name of the file.
        folder: of the run.
        warnings: what a person can act on; log.txt must hold them all.
    """
    folder = Path(folder)
    rows = {
        "train": f"{_images(train)}; {_classes(train.objects)}",
        "validate": f"{_images(val)}; {counted(sum(val.objects.values()), 'object')}",
        "sizes": _sizes(sizes),
        "length": _length(plan),
        "rate": _rates(plan.rates),
        "runs on": f"{plan.device}, {plan.precision}; attention operator: {plan.operator}",
        "weights": weights,
    }
    paths = {
        "writes": f"{folder}, every detail to log.txt in it",
        "look at": f"{folder / 'train_batch.png'} after the first iteration: do the boxes fit?",
        "": f"{folder / 'curves.png'} after each evaluation",
    }
    if plan.tensorboard:
        paths[" "] = f"tensorboard --logdir {shlex.quote(str(folder))}"
    lines = [f"training {printable(recipe)}", *(line for label, text in rows.items() for line in _row(label, text))]
    lines += [f"  {label:<{_COLUMN}}{printable(text, None)}" for label, text in paths.items()]
    return [*lines, *_warnings(warnings, MOST_LINES - len(lines))]


def evaluation_lines(results: Mapping[str, Mapping]) -> list[str]:
    """AP, AP50 and AP75 of raw and averaged weights; of the better ones the AP of each class, if at most ten.

    Args:
        results: as of Detectron2's evaluators: {"bbox": {"AP": percent, …, "AP-<class>": percent}}; those of averaged
            weights under "ema".
    """
    measured = {"raw weights": results.get("bbox", {}), "averaged weights": results.get("ema", {}).get("bbox", {})}
    measured = {kind: values for kind, values in measured.items() if "AP" in values}
    width = max(map(len, measured), default=0)
    lines = [f"{kind:<{width}}  {_figures(values, _METRICS)}" for kind, values in measured.items()]
    best = max(measured.values(), key=lambda values: np.nan_to_num(values["AP"], nan=-1), default={})
    classes = {key.removeprefix("AP-"): value for key, value in best.items() if key.startswith("AP-")}
    if 1 < len(classes) <= _MOST_CLASSES:
        lines.append(f"AP by class  {_figures(classes, classes)}")
    return lines


def _figures(values: Mapping[str, float], names: Iterable[str]) -> str:
    """Those of the named values that are there, with their names."""
    return "  ".join(f"{printable(name, 30)} {percent(values[name])}" for name in names if name in values)


def best_line(metric: str, value: float, kind: str) -> str:
    """The line about new best weights.

    Args:
        metric: for example "bbox/AP", in percent.
        kind: of the weights, raw or averaged.
    """
    shown = percent(value) if metric.rpartition("/")[2].startswith("AP") else f"{value:.4g}"
    return f"best {metric} so far: {shown}, {kind} weights, in model_best.pth"


def closing_lines(
    folder: str | Path, results: Mapping[str, Mapping], val: Sequence[str] = (), best: float | None = None
) -> list[str]:
    """The last lines of a training: AP, the best file, and the next commands.

    Args:
        folder: of the run.
        results: of the last evaluation, as of `evaluation_lines`; those of averaged weights under "ema".
        val: words of `dino eval` for the validation data, such as annotations and images.
        best: AP of model_best.pth in percent.
    """
    folder, run = Path(folder), shlex.quote(str(folder))
    last = _last_ap(results)
    file = next((x for x in (folder / "model_best.pth", folder / "model_final.pth") if x.exists()), folder)
    shown = last if best is None else best
    of_best = f", AP {percent(shown)}" if shown is not None and file.stem == "model_best" else ""
    data = "".join(f" {shlex.quote(str(path))}" for path in val)
    return [
        *([] if last is None else [f"AP {percent(last)} at the end"]),
        f"best weights: {printable(file, None)}{of_best}",
        "next:",
        f"  dino predict {run} photo.jpg",
        f"  dino eval {run}{data}",
    ]


def _last_ap(results: Mapping[str, Mapping]) -> float | None:
    """AP of the better of raw and averaged weights, NaN where it is undefined; None where it was not measured."""
    evaluated = results.get("bbox", {}), results.get("ema", {}).get("bbox", {})
    measured = [values["AP"] for values in evaluated if "AP" in values]
    return max(measured, key=lambda value: np.nan_to_num(value, nan=-1), default=None)


def percent(value: float) -> str:
    """An AP in percent with one digit, such as "49.0"; "undefined" for NaN and negative values, as COCO's -1."""
    return f"{value:.1f}" if value >= 0 else "undefined"


def _images(split: Split) -> str:
    return f"{counted(split.images, 'image')}, {split.empty:,} of them without objects"


def _classes(objects: Mapping[str, int]) -> str:
    """Number of objects, and of those of each class, the most frequent first where there are many."""
    shown = dict(objects)
    if len(objects) > _MOST_CLASSES:
        shown = dict(sorted(objects.items(), key=lambda item: -item[1])[:_MOST_CLASSES])
    names = [f"{printable(name, 30)} {number:,}".replace(" ", _TIED) for name, number in shown.items()]
    more = [f"and {len(objects) - len(shown)} more"] if len(objects) > len(shown) else []
    total = counted(sum(objects.values()), "object")
    return f"{total} of {counted(len(objects), 'class', 'classes')}: {', '.join([*names, *more])}"


def _sizes(sizes: np.ndarray) -> str:
    if not len(sizes):
        return "unknown"
    low, median, high = np.percentile(sizes, (5, 50, 95))
    return f"objects of {median:.0f} pixels after the resize (median; 5% below {low:.0f}, 5% above {high:.0f})"


def _length(plan: Plan) -> str:
    number = f"{plan.iterations / plan.per_epoch:.3g}" if plan.per_epoch else ""
    epochs = f" = {number} epoch{'' if number == '1' else 's'}" if number else ""
    parts = [f"{plan.iterations:,} iterations of {counted(plan.batch, 'image')}{epochs}"]
    parts += [f"starts at iteration {plan.start:,}"] if plan.start else []
    parts += [f"an evaluation every {plan.eval_period:,}"] if plan.eval_period else ["an evaluation at the end"]
    return "; ".join(parts)


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{rate:.2g} ({what})" if len(rates) > 1 else f"{rate:.2g}" for what, rate in rates.items())


def _row(label: str, text: str) -> list[str]:
    """A labelled text in at most two lines."""
    indent = " " * (_COLUMN + 2)
    lines = textwrap.wrap(
        printable(text, None),
        width=_WIDTH,
        initial_indent=f"  {label:<{_COLUMN}}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=2,
        placeholder=" …",
    )
    return [line.replace(_TIED, " ") for line in lines]


def _warnings(warnings: Sequence[str], room: int) -> list[str]:
    """The warnings in so many lines, one each."""
    shown = [f"warning: {printable(text, 400)}" for text in warnings]
    if len(shown) <= room:
        return shown
    return [*shown[: room - 1], f"warning: {len(shown) - room + 1} more warnings are in log.txt"]
