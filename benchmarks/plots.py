"""Pictures of the measurements, by matplotlib, as SVG files that are the same for the same numbers."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dino.utils.files import write_whole

MIB = 2**20
GREY = "#9aa5b1"
COLOURS = {"compiled": "#2f6fb5", "fused": "#e08e2b", "original": "#5c9e5c", "triton": "#8a63b5"}
WORK_COLOURS = {"inference": "#2f6fb5", "training": "#e08e2b"}
# measured, counted, and the number of units that is one of the plot
QUANTITIES = (("seconds", "multiply_adds", 1), ("extra_bytes", "bytes_counted", MIB))


def save_svg(figure, path):
    """Write the figure with its texts as texts: small files that can be searched."""
    FigureCanvasSVG(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dino"}):
        write_whole(Path(path), lambda part: figure.savefig(part, format="svg", metadata={"Date": None}))


def plot_ratios(path, bars):
    """How many times faster than the reference: one bar for each measurement, grouped by case.

    Args:
        bars: (case, contender, ratio) in the order of the picture, from top to bottom.
    """
    figure = Figure(figsize=(8.2, 0.6 + 0.24 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    middles, names = [], []
    y = 0.0
    for case in dict.fromkeys(case for case, _, _ in bars):
        group = [(contender, ratio) for name, contender, ratio in bars if name == case]
        middles.append(y + (len(group) - 1) / 2)
        names.append(case)
        for contender, ratio in group:
            axes.barh(y, ratio, height=0.82, color=COLOURS[contender])
            axes.annotate(
                f"{ratio:.1f} {contender}", (ratio, y), (4, 0), textcoords="offset points", va="center", size=8
            )
            y += 1
        y += 0.5
    axes.axvline(1, color=GREY, linewidth=1.5)
    axes.set_yticks(middles, names, size=9)
    axes.set_ylim(y - 0.5, -1)
    axes.set_xlim(0, 1.22 * max(ratio for _, _, ratio in bars))
    axes.set_title("times faster than the reference (grey line: 1)", size=10, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)


def plot_growth(path, curves):
    """A column for each curve, time above memory; what the count says from the first point on is dashed.

    Args:
        curves: (curve, work) -> rows of benchmarks/growth.py.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    figure = Figure(figsize=(2.4 * len(names), 4.6), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        works = {work: points for (curve, work), points in curves.items() if curve == name}
        for axes, quantity in zip(grid[:, column], QUANTITIES, strict=True):
            _plot_quantity(axes, works, *quantity)
        grid[0, column].set_title(name, size=10)
    for axes, label in zip(grid[:, 0], ("time in s", "memory in MiB"), strict=True):
        axes.set_ylabel(label, size=9)
    handles = [Line2D([], [], color=colour, linewidth=2, label=work) for work, colour in WORK_COLOURS.items()]
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label="what the count says"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_svg(figure, path)


def _plot_quantity(axes, works, measured, counted, factor):
    """One small plot: measured and counted values of each work over the values that were changed."""
    for work, points in works.items():
        values = [point["value"] for point in points]
        if all(point[measured] is not None for point in points):
            start = points[0]
            found = [point[measured] / factor for point in points]
            expected = [point[counted] / start[counted] * found[0] for point in points]
            axes.plot(values, found, color=WORK_COLOURS[work], linewidth=2, marker=".")
            axes.plot(values, expected, color=WORK_COLOURS[work], linewidth=1, linestyle="--")
    axes.set_ylim(0, None)
    axes.margins(x=0.08)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(path, panels, columns=None):
    """Mean curves with the range between the lowest and the highest; the y axis begins near the lowest value.

    Args:
        panels: (title, labels of x and y, [(label, (x, mean, low, high)), …]); a label whose second part is None is
            left out, but keeps its colour.
        columns: panels in a row of the picture, whose number divides that of all panels; None for one row.
    """
    columns = columns or len(panels)
    rows = len(panels) // columns
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, (xlabel, ylabel), curves) in zip(places, panels, strict=True):
        for number, (label, curve) in enumerate(curves):
            if curve:
                x, mean, low, high = curve
                style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
                axes.plot(x, mean, marker=".", label=label, **style)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, loc="lower right")
    save_svg(figure, path)
