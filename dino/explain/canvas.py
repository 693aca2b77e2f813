"""Colours, frames and labels of all pictures, and writing of small files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageColor
from torch import Tensor

from dino.inference.fonts import legible
from dino.inference.label_placement import place_labels
from dino.inference.palette import hex_of, ink_on
from dino.layers import Target, cxcywh_to_xyxy
from dino.utils.files import write_whole

from .record import Record

INK, SOFT, _PAPER = "#1f2933", "#7b8794", "#ffffff"
POSITIVE, NEGATIVE, EMPTY, MATCHING = "#009e73", "#d55e00", "#a8b0b8", "#3b6fb6"  # kinds of queries; EMPTY: padding
BLOCKED = "#f1f3f5"
LOSSES = {"ce": "#3b6fb6", "bbox": "#e69f00", "giou": "#b07aa1"}
_OBJECTS = (
    "#c8102e",
    "#0067b1",
    "#d98200",
    "#6a3d9a",
    "#128a3a",
    "#c2187f",
    "#008c95",
    "#7a4a20",
    "#44525c",
    "#8a8f00",
)
LEVELS = ("#2274a5", "#e08e00", "#c2187f", "#3a8f3a", "#5b4b8a")  # from fine to coarse
_ACCENTS = [
    channel
    for colour in (
        INK,
        SOFT,
        _PAPER,
        POSITIVE,
        NEGATIVE,
        EMPTY,
        MATCHING,
        BLOCKED,
        *LOSSES.values(),
        *_OBJECTS,
        *LEVELS,
    )
    for channel in ImageColor.getrgb(colour)
]  # kept exactly, however little of a picture they cover
_DOTS_PER_INCH, _NAME_PIXELS = 120, 12  # the height of a name
_SHADES = 192  # colours of a finished file beside those above


class Scene(NamedTuple):
    """One image of a recorded batch."""

    record: Record
    image: int  # which one
    pixels: np.ndarray  # (H, W, 3) float in [0, 1], RGB, without padding
    targets: list[Target]  # of the whole batch
    names: Sequence[str]  # of the classes

    @property
    def target(self) -> Target:
        """The objects of this image."""
        return self.targets[self.image]

    def corners(self, boxes: Tensor) -> np.ndarray:
        """Boxes (..., 4) as fractions -> xyxy in pixels of this image."""
        height, width = self.pixels.shape[:2]
        return cxcywh_to_xyxy(boxes.float()).numpy() * np.array([width, height, width, height])


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **layout: object
) -> tuple[Figure, np.ndarray]:
    """Make a figure, width and height in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=_PAPER)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def show_image(axes: Axes, pixels: np.ndarray, title: str = "") -> None:
    """Show the image, pale, so that drawings on it stand out."""
    grey = pixels.mean(-1, keepdims=True)
    pale = 0.32 + 0.68 * (0.65 * pixels + 0.35 * grey)
    height, width = pixels.shape[:2]
    axes.imshow(pale, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    frame(axes, title)


def frame(axes: Axes, title: str) -> None:
    """Add a title and a quiet border."""
    axes.set_title(title, color=INK, fontsize=10)
    for spine in axes.spines.values():
        spine.set(color=SOFT, linewidth=0.6)


def add_boxes(axes: Axes, boxes: np.ndarray, colours: Iterable[str] | str, **look: object) -> None:
    """Outlines of boxes (K, 4), xyxy in pixels; one colour for all or one for each."""
    colours = [colours] * len(boxes) if isinstance(colours, str) else colours
    look = {"linewidth": 1.7, "fill": False} | look
    halo = patheffects.withStroke(linewidth=look["linewidth"] + 1.4, foreground=_PAPER, alpha=0.8)
    look = {"path_effects": [halo]} | look
    for (x0, y0, x1, y1), colour in zip(boxes, colours, strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, edgecolor=colour, **look))


def add_label(axes: Axes, x: float, y: float, text: str, colour: str = INK, **look: object) -> None:
    """Add text with a halo."""
    halo = patheffects.withStroke(linewidth=2.4, foreground=_PAPER)
    look = {"fontsize": 8, "va": "center", "ha": "center"} | look
    axes.text(x, y, escaped(text), color=colour, path_effects=[halo], clip_on=True, **look)


def add_names(axes: Axes, boxes: np.ndarray, colours: Sequence[str], texts: Sequence[str], width: float) -> None:
    """Names of boxes (K, 4), xyxy in pixels, that stand at them and never on each other.

    Args:
        width: of the axes in inches, about.
    """
    (_, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    scale = width * _DOTS_PER_INCH / right  # pixels of the file for one of the image
    size = (round(right * scale), round(bottom * scale))
    high = np.array([right, bottom] * 2)
    plates, _ = place_labels(size, [tuple(box) for box in np.clip(boxes, 0, high) * scale], texts, _NAME_PIXELS)
    for plate in plates:
        x0, y0, x1, y1 = (value / scale for value in plate.place)
        colour = colours[plate.index]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color=colour, linewidth=0, zorder=3))
        look = {"fontsize": plate.font.size * 72 / _DOTS_PER_INCH, "ha": "center", "va": "center", "zorder": 4}
        ink = hex_of(ink_on(ImageColor.getrgb(colour)))
        axes.text((x0 + x1) / 2, (y0 + y1) / 2, escaped(plate.text), color=ink, clip_on=True, **look)


def escaped(text: str, limit: int | None = None) -> str:
    """A name for matplotlib: one line of at most `limit` columns, no formula."""
    return legible(text, limit).replace("$", r"\$")


def add_legend(figure: Figure, entries: dict[str, str]) -> None:
    """Add a legend of colours below the figure, in as many rows as its width needs."""
    patches = [Patch(facecolor=colour, label=text, edgecolor=SOFT, linewidth=0.4) for text, colour in entries.items()]
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(patches), 0, -1):
        look = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9, "labelcolor": INK}
        legend = figure.legend(handles=patches, handlelength=0.9, handleheight=0.9, **look)
        if legend.get_window_extent(renderer).width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def object_colours(count: int) -> list[str]:
    """A colour for each object of an image, the same in all pictures."""
    return [_OBJECTS[g % len(_OBJECTS)] for g in range(count)]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    image = Image.open(buffer).convert("RGB")
    palette = Image.new("P", (1, 1))
    palette.putpalette(image.quantize(_SHADES).getpalette()[: 3 * _SHADES] + _ACCENTS)
    small = image.quantize(palette=palette, dither=Image.Dither.NONE)
    margin = 3 * small.getpixel((0, 0))  # Pillow takes a colour near to white for it
    small.putpalette(small.getpalette()[:margin] + [255] * 3 + small.getpalette()[margin + 3 :])
    write_whole(path, lambda part: small.save(part, format="PNG", optimize=True))
