"""Self-contained HTML pages: style, script and pictures in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

import dino
from dino.data.images import read_image
from dino.inference.palette import Colour, hex_of, ink_on
from dino.utils.files import write_whole

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_SIDE = 900  # pixels of a picture in a page


class Mark(NamedTuple):
    """A box drawn over a picture.

    Args:
        box: xywh in pixels of the image.
        label: text at its corner.
        kind: CSS class, which sets the colour.
        score: threshold above which it is hidden; None for never.
        title: tooltip.
        colour: instead of that of the kind.
    """

    box: Sequence[float]
    label: str
    kind: str
    score: float | None = None
    title: str = ""
    colour: Colour | None = None


class Figure(NamedTuple):
    """A picture with boxes. `source` is a data URI, empty for one that can't be drawn; width and height in pixels.

    Args:
        groups: words for the page's filter.
        flags: what is wrong with the image, level ("error", "warning") and text.
    """

    source: str
    width: int
    height: int
    caption: str
    marks: list[Mark]
    groups: str = ""
    flags: Sequence[tuple[str, str]] = ()

    def place(self, mark: Mark) -> str:
        """CSS of a mark: its place in percent of the picture, cut off at its borders, and its colour."""
        x, y, width, height = mark.box
        x0, y0 = min(max(x / self.width, 0), 1), min(max(y / self.height, 0), 1)
        x1, y1 = min((x + width) / self.width, 1), min((y + height) / self.height, 1)
        sides = {"left": x0, "top": y0, "width": max(x1 - x0, 0), "height": max(y1 - y0, 0)}
        return ";".join(f"{side}:{100 * part:.2f}%" for side, part in sides.items()) + tones(mark.colour)


def tones(colour: Colour | None) -> str:
    """CSS of a colour and of the text on it; none for None."""
    return f";--tone:{hex_of(colour)};--on:{hex_of(ink_on(colour))}" if colour else ""


def draw(path: Path, caption: str, marks: list[Mark], groups: str = "", window: Sequence[int] | None = None) -> Figure:
    """A figure of an image file, or of its part inside `window` (xyxy in whole pixels); marks lie in the image.

    Raises:
        DataError: see `read_image`.
    """
    pixels = read_image(path)
    if window:
        x0, y0, x1, y1 = window
        pixels = pixels[y0:y1, x0:x1]
        moved = [mark._replace(box=[mark.box[0] - x0, mark.box[1] - y0, *mark.box[2:]]) for mark in marks]
        marks = [mark for mark in moved if _meets(mark.box, x1 - x0, y1 - y0)]
    image = Image.fromarray(pixels)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Figure(source, pixels.shape[1], pixels.shape[0], caption, marks, groups)


def _meets(box: Sequence[float], width: float, height: float) -> bool:
    """Whether a part of a box (xywh) lies in a picture."""
    x, y, w, h = box
    return x < width and y < height and x + w > 0 and y + h > 0


def _include(name: str) -> Markup:
    """A file of the templates' folder, unescaped: style or script."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Render a template into a file, whole or not at all.

    Raises:
        DataError: it can't be written.
    """
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template(template).render(include=_include, tones=tones, version=dino.__version__, **values)
    write_whole(path, lambda part: part.write_bytes(text.encode("utf-8", "replace")))
