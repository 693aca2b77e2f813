"""Curves as SVG that takes the colours and fonts of the page around it."""

from __future__ import annotations

import io
import warnings

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .error_analysis import THRESHOLDS, Analysis, f1_of, rates

INK, SOFT, ACCENT = "#010203", "#040506", "#070809"  # replaced by what the page's style says, light or dark
COLOURS = ("#14a05a", "#e0353f", "#f2a100", "#a04be0", "#0a93c7", "#d35aa8", "#8a6d3b", "#3f51d6")
MOST_CURVES = len(COLOURS)  # classes that are told apart by colour
RECALLS = np.linspace(0, 1, 101)


def to_svg(figure: Figure) -> Markup:
    """The figure as inline SVG, its three placeholder colours replaced by those of the page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "dino"}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts draw the text
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for placeholder, value in ((INK, "currentColor"), (SOFT, "var(--soft)"), (ACCENT, "var(--accent)")):
        text = text.replace(placeholder, value)
    return Markup(text[text.index("<svg") :])


def new_chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Axes from 0 to 1 in both directions."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel(xlabel, color=INK, size=11)
    axes.set_ylabel(ylabel, color=INK, size=11)
    axes.grid(color=SOFT, alpha=0.25, linewidth=0.7)
    axes.tick_params(colors=SOFT, labelcolor=SOFT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)
    return figure, axes


def add_legend(axes: Axes) -> None:
    """A legend without a frame, in the page's ink."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="best")


def precision_recall(analysis: Analysis) -> Markup:
    """Precision over recall at IoU 0.5: each class, and the mean of all at 0.5 and 0.75."""
    figure, axes = new_chart("recall", "precision")
    at_half = analysis.precision[0]
    defined = [k for k in range(len(analysis.names)) if (at_half[:, k] > -1).any()]
    named = len(defined) <= MOST_CURVES
    for place, k in enumerate(defined):
        look = {"color": COLOURS[place], "label": plain(analysis.names[k])} if named else {"color": SOFT, "alpha": 0.25}
        axes.plot(RECALLS, at_half[:, k], linewidth=1.6 if named else 0.8, **look)
    if defined:
        axes.plot(RECALLS, at_half[:, defined].mean(1), color=ACCENT, linewidth=3, label="mean, IoU 0.5")
        strict = analysis.precision[5][:, defined].mean(1)
        axes.plot(RECALLS, strict, color=ACCENT, linewidth=2, linestyle="--", label="mean, IoU 0.75")
        add_legend(axes)
    return to_svg(figure)


def over_threshold(analysis: Analysis) -> Markup:
    """Precision, recall and F1 of all classes together over the score threshold."""
    figure, axes = new_chart("score threshold", "precision, recall, F1")
    precision, recall = rates(analysis.tally)
    axes.plot(THRESHOLDS, precision, color=COLOURS[4], linewidth=2, label="precision")
    axes.plot(THRESHOLDS, recall, color=COLOURS[2], linewidth=2, label="recall")
    axes.plot(THRESHOLDS, f1_of(precision, recall), color=ACCENT, linewidth=3, label="F1")
    axes.axvline(analysis.threshold, color=INK, linewidth=1, linestyle=":", label=f"best F1: {analysis.threshold:.2f}")
    add_legend(axes)
    return to_svg(figure)


def plain(name: str) -> str:
    """A class name as matplotlib shows it literally: no formulas, not taken for a hidden label."""
    text = name.encode("utf-8", "replace").decode().replace("$", r"\$")
    text = text if len(text) <= 24 else text[:23] + "…"
    return f" {text}" if text.startswith("_") else text
