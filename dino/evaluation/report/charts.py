"""Curves as SVG in the colours and fonts of the surrounding page."""

from __future__ import annotations

import io
import warnings

import numpy as np
from markupsafe import Markup
from matplotlib import patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from dino.inference.palette import ON_PAGE, colour_of, hex_of
from dino.utils.printable import printable

from .error_analysis import THRESHOLDS, Analysis, f1_of, rates

_INK, _SOFT, _ACCENT, _PAPER = ON_PAGE
_PRECISION, _RECALL = "#0a93c7", "#f2a100"
_MOST_CURVES = 8  # classes with a colour of their own
_PAGE = ("currentColor", "var(--soft)", "var(--accent)", "var(--card)")  # what ON_PAGE stands for
_EDGE = [patheffects.withStroke(linewidth=2.4, foreground=_SOFT)]  # pale lines are seen on pale ground
_RECALLS = np.linspace(0, 1, 101)


def to_svg(figure: Figure) -> Markup:
    """Render a figure as inline SVG in the page's colours."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "dino"}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts draw the text
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for placeholder, value in zip(ON_PAGE, _PAGE, strict=True):
        text = text.replace(placeholder, value)
    return Markup(text[text.index("<svg") :])


def _new_chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Axes from 0 to 1 in both directions."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel(xlabel, color=_INK, size=11)
    axes.set_ylabel(ylabel, color=_INK, size=11)
    axes.grid(color=_SOFT, alpha=0.25, linewidth=0.7)
    axes.tick_params(colors=_SOFT, labelcolor=_SOFT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_SOFT)
    return figure, axes


def _add_legend(axes: Axes) -> None:
    """A legend without a frame, in the page's ink."""
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9, loc="best")


def draw_charts(analysis: Analysis) -> list[tuple[str, Markup]]:
    """Titles and SVG pictures of the curves."""
    return [
        ("Precision and recall", _precision_recall(analysis)),
        ("Choosing a threshold", _over_threshold(analysis)),
    ]


def _precision_recall(analysis: Analysis) -> Markup:
    """Draw precision over recall: each class at IoU 0.5, the mean of all at 0.5 and 0.75."""
    figure, axes = _new_chart("recall", "precision")
    at_half = analysis.precision[0]
    defined = [k for k in range(len(analysis.names)) if (at_half[:, k] > -1).any()]
    named = len(defined) <= _MOST_CURVES
    for k in defined:
        look = (
            {"color": hex_of(colour_of(k)), "label": _plain(analysis.names[k]), "path_effects": _EDGE}
            if named
            else {"color": _SOFT, "alpha": 0.25}
        )
        axes.plot(_RECALLS, at_half[:, k], linewidth=1.6 if named else 0.8, **look)
    if defined:
        axes.plot(_RECALLS, at_half[:, defined].mean(1), color=_ACCENT, linewidth=3, label="mean, IoU 0.5")
        strict = analysis.precision[5][:, defined].mean(1)
        axes.plot(_RECALLS, strict, color=_ACCENT, linewidth=2, linestyle="--", label="mean, IoU 0.75")
        _add_legend(axes)
    return to_svg(figure)


def _over_threshold(analysis: Analysis) -> Markup:
    """Draw precision, recall and F1 of all classes together over the score threshold."""
    figure, axes = _new_chart("score threshold", "precision, recall, F1")
    precision, recall = rates(analysis.tally)
    axes.plot(THRESHOLDS, precision, color=_PRECISION, linewidth=2, label="precision")
    axes.plot(THRESHOLDS, recall, color=_RECALL, linewidth=2, label="recall")
    axes.plot(THRESHOLDS, f1_of(precision, recall), color=_ACCENT, linewidth=3, label="F1")
    axes.axvline(analysis.threshold, color=_INK, linewidth=1, linestyle=":", label=f"best F1: {analysis.threshold:.2f}")
    _add_legend(axes)
    return to_svg(figure)


def _plain(name: str) -> str:
    """Escape a class name for matplotlib: no formulas, no hidden label."""
    text = printable(name, None).encode("utf-8", "replace").decode().replace("$", r"\$")
    text = text if len(text) <= 24 else text[:23] + "…"
    return f" {text}" if text.startswith("_") else text
