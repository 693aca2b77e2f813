"""The curves of a run: losses, learning rate, AP of the evaluations, AP of each class."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dino.inference.fonts import font_families, legible
from dino.inference.palette import ON_PAGE, ON_WHITE, Look, colour_of, hex_of
from dino.utils.files import write_whole

from .metrics_file import is_number, read_metrics

Series = dict[int, float]  # iteration -> value

_LOSSES = {"total_loss": "all losses", "loss_ce": "class", "loss_bbox": "box, L1", "loss_giou": "box, GIoU"}
_AP, _CLASS = "bbox/AP", "bbox/AP-"
_EMA = "ema/"  # in front of the keys of averaged weights
_MOST_POINTS = 1500  # drawn of a curve
_MOST_NAMED = 8  # classes with a colour of their own
_COLUMNS = 22  # of a class name


def draw_curves(folder: str | Path, names: Sequence[str] = ()) -> None:
    """Draw `curves.png` from a run's metrics.json.

    Args:
        folder: of the run.
        names: of the classes, by label: gives their curves the colours that they have in the pictures.

    Raises:
        UserError: the file can't be written.
    """
    folder = Path(folder)
    series = read_series(folder)
    texts = [legible(key) for key in series] + [legible(folder.resolve().name)]
    with rc_context({"font.family": font_families(texts)}):
        figure = curves_figure(series, folder.resolve().name, names)
        FigureCanvasAgg(figure)
        write_whole(folder / "curves.png", lambda part: figure.savefig(part, format="png", dpi=100))


def run_curves(checkpoint: str | Path | None) -> Figure | None:
    """The curves of the run of a checkpoint, or in a folder, for a page; None where there is no such run.

    Raises:
        UserError: metrics.json can't be read.
    """
    path = Path(checkpoint or "")
    folder = path if path.is_dir() else path.parent
    if not checkpoint or not path.exists() or not (folder / "metrics.json").is_file():
        return None
    series = read_series(folder)
    return curves_figure(series, folder.resolve().name, look=ON_PAGE) if series else None


def curves_figure(series: dict[str, Series], title: str, names: Sequence[str] = (), look: Look = ON_WHITE) -> Figure:
    """A figure of all curves.

    Args:
        series: the values of each key of metrics.json.
        title: above all.
        names: of the classes, by label.
    """
    figure = Figure(figsize=(12, 7.6), layout="constrained", facecolor=look.paper)
    figure.suptitle(_plain(title, 60), color=look.ink, fontsize=14, fontweight="bold")
    (losses, ap), (rate, classes) = figure.subplots(2, 2, gridspec_kw={"height_ratios": (1.25, 1)})
    _draw_losses(losses, series, look)
    _draw_rate(rate, series, look)
    best = _draw_ap(ap, series, look)
    _draw_classes(classes, series, best, names, look)
    last = max((iteration for values in series.values() for iteration in values), default=0)
    for axes in (losses, rate, ap, classes):
        _dress(axes, look, last, "one class: see above" if best and axes is classes else "no values yet")
    return figure


def _draw_losses(axes: Axes, series: dict[str, Series], look: Look) -> None:
    """Draw the sum of all losses and the three of the last decoder layer."""
    axes.set_title("Training losses")
    lowest = math.inf
    for number, (key, name) in enumerate(_LOSSES.items()):
        if not series.get(key):
            continue
        iterations, values = _arrays(series[key])
        _plot(axes, iterations, values, color=_line_colour(number - 1, look), label=f"{name}: {values[-1]:.3g}")
        lowest = min(lowest, values.min())
    if 0 < lowest < math.inf:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("loss; the legend has the last value")


def _draw_rate(axes: Axes, series: dict[str, Series], look: Look) -> None:
    axes.set_title("Learning rate")
    if series.get("lr"):
        _plot(axes, *_arrays(series["lr"]), color=look.accent)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylim(0, None if series.get("lr") else 1)


def _draw_ap(axes: Axes, series: dict[str, Series], look: Look) -> tuple[str, int] | None:
    """Draw AP and AP50 -> prefix of the keys and iteration of the best evaluation, None without one."""
    axes.set_title("Validation AP, percent")
    for metric, width in (("AP", 2.4), ("AP50", 1.2)):
        for prefix, note, colour in (("", "", look.accent), (_EMA, " of averaged weights", hex_of(colour_of(1)))):
            if values := series.get(f"{prefix}bbox/{metric}"):
                style = {"linewidth": width, "linestyle": "--" if prefix else "-", "color": colour}
                label = f"{metric}{note}, highest: {max(values.values()):.1f}"
                _plot(axes, *_arrays(values), label=label, marker="o", **style)
    best = _best(series)
    if best:
        prefix, iteration = best
        value = series[prefix + _AP][iteration]
        text = f"best: AP {value:.1f}, iteration {iteration + 1:,}"
        star = {"marker": "*", "markersize": 17, "color": "#d6006c", "markeredgecolor": "white", "linestyle": ""}
        axes.plot([iteration + 1], [value], label=text, zorder=5, **star)
    axes.set_ylim(0, _ceiling(series, ("bbox/AP50", _AP)))
    return best


def _draw_classes(
    axes: Axes, series: dict[str, Series], best: tuple[str, int] | None, names: Sequence[str], look: Look
) -> None:
    """Draw AP of each class: all of a few, of many the highest and lowest at the best evaluation in colour."""
    prefix, iteration = best or ("", 0)
    start = prefix + _CLASS
    found = {key.removeprefix(start): values for key, values in series.items() if key.startswith(start)}
    which = "each class" if len(found) <= _MOST_NAMED else f"{len(found)} classes"
    axes.set_title(f"Validation AP of {which}{' (averaged weights)' if prefix else ''}")
    ends, between = _split(sorted(found, key=lambda name: -found[name].get(iteration, -1.0)))
    labels = {name: label for label, name in enumerate(dict.fromkeys([*names, *found]))}
    for name in between:
        _plot(axes, *_arrays(found[name]), color=look.soft, linewidth=0.7, alpha=0.35)
    for name in ends:
        label = f"{_plain(name, _COLUMNS)}: {found[name].get(iteration, math.nan):.1f}"
        _plot(axes, *_arrays(found[name]), color=hex_of(colour_of(labels[name])), label=label, marker="o")
    if between:
        axes.plot([], [], color=look.soft, alpha=0.5, label=f"{len(between)} classes between them")
    axes.set_ylim(0, _ceiling(found, found))


def _split(order: list[str]) -> tuple[list[str], list[str]]:
    """Names in order -> up to _MOST_NAMED of them, of more the first and the last ones; and the others."""
    half = _MOST_NAMED // 2
    return (order, []) if len(order) <= _MOST_NAMED else ([*order[:half], *order[-half:]], order[half:-half])


def _best(series: dict[str, Series]) -> tuple[str, int] | None:
    """Prefix of the keys and iteration of the evaluation with the highest AP, the first of equal ones."""
    entries = [(p, i, ap) for p in ("", _EMA) for i, ap in sorted(series.get(p + _AP, {}).items())]
    return max(entries, key=lambda entry: entry[2])[:2] if entries else None


def _ceiling(series: dict[str, Series], keys: Iterable[str]) -> float:
    """Upper end of an axis of percent."""
    values = [v for key in keys for prefix in ("", _EMA) for v in series.get(prefix + key, {}).values()]
    return min(105.0, max(1.0, 1.2 * max(values, default=84.0)))


def _line_colour(number: int, look: Look) -> str:
    return look.ink if number < 0 else hex_of(colour_of(number))


def _plot(axes: Axes, iterations: np.ndarray, values: np.ndarray, *, marker: str = "", **look: object) -> None:
    """A line; of few points with markers, of more than fit the mean of neighbours."""
    if len(values) > _MOST_POINTS:
        parts = np.array_split(np.arange(len(values)), _MOST_POINTS)
        iterations = np.array([iterations[part[-1]] for part in parts])
        values = np.array([values[part].mean() for part in parts])
    few = len(values) == 1 or (marker and len(values) <= 60)
    axes.plot(iterations + 1, values, marker="o" if few else "", markersize=4, **{"linewidth": 1.6} | look)


def _dress(axes: Axes, look: Look, last: int, note: str) -> None:
    """Grid, frame, legend and a common iteration axis; `note` where there are no lines."""
    axes.set_xlim(0, (last + 1) * 1.02 if last else 2)
    axes.set_xlabel("iteration", color=look.soft)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
    axes.title.set(color=look.ink, fontsize=11)
    axes.yaxis.label.set_color(look.soft)
    axes.grid(color=look.soft, alpha=0.25, linewidth=0.7)
    axes.tick_params(colors=look.soft, length=0)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=look.soft)
    if axes.get_legend_handles_labels()[0]:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "columnspacing": 1.2, "handlelength": 1.5}
        columns = {"log": 4}.get(axes.get_yscale(), 3 if len(axes.lines) >= _MOST_NAMED else 0)
        place = {**below, "ncols": columns} if columns else {"loc": "best"}
        axes.legend(facecolor=look.paper, edgecolor="none", framealpha=0.8, labelcolor=look.ink, fontsize=9, **place)
    elif not axes.lines:
        axes.text(0.5, 0.5, note, color=look.soft, ha="center", va="center", transform=axes.transAxes)


def _arrays(values: Series) -> tuple[np.ndarray, np.ndarray]:
    """Iterations in rising order, and their values."""
    iterations = np.array(sorted(values))
    return iterations, np.array([values[i] for i in iterations.tolist()])


def _plain(name: str, limit: int) -> str:
    """A name for matplotlib: no formulas, no hidden label."""
    text = legible(name, limit).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def read_series(folder: str | Path) -> dict[str, Series]:
    """Key -> iteration (from 0) -> value, finite numbers only, of a run's metrics.json and evaluations.json.

    An evaluation right after a checkpoint is in evaluations.json alone, under the number of completed iterations.

    Raises:
        UserError: see `read_metrics`.
    """
    series: dict[str, Series] = defaultdict(dict)
    completed = [{**entry, "iteration": entry["iteration"] - 1} for entry in _evaluations(Path(folder))]
    known = set().union(*completed) - {"iteration"}
    metrics = read_metrics(Path(folder) / "metrics.json")  # counts the last evaluation as one iteration more
    for entry in [*completed, *({key: x[key] for key in x.keys() - known} for x in metrics)]:
        for key, value in entry.items():
            if is_number(value):
                series[key][entry["iteration"]] = value
    series.pop("iteration", None)
    return series


def _evaluations(folder: Path) -> list[dict]:
    """The entries of evaluations.json; none of a damaged file, which the training itself reports."""
    try:
        found = json.loads((folder / "evaluations.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and type(entry.get("iteration")) is int]
