"""Boxes drawn on pictures: with a name and a score, in the colour of the class or in one that is given."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]  # RGB, 0 to 255

_GOLDEN_RATIO = (5**0.5 - 1) / 2  # hues a step of this apart stay apart, however many there are
_DARK, _LIGHT = (0, 0, 0), (255, 255, 255)
_GROUND, _GAP = (40, 40, 40), 4  # of a grid of pictures: colour, pixels between them


def draw_detections(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """A copy of an RGB image with detections in the colours of their classes, the first ones on top.

    Args:
        boxes: see `draw_boxes`.
        labels: of the classes, which choose the colours.
        texts: what the boxes are called.
    """
    return draw_boxes(image, boxes, [_colour_of(label) for label in labels], texts)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    colours: Sequence[Colour],
    texts: Sequence[str] = (),
    *,
    width: int | None = None,
) -> Image.Image:
    """A copy of an RGB image with boxes, the first ones on top.

    Args:
        boxes: xyxy in pixels. What reaches out of the image is cut off at its border; boxes that lie outside, or have
            their sides inverted, are left out.
        colours: one for each box.
        texts: one for each box; empty for none.
        width: of a line in pixels; None for one that suits the image.
    """
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    width = width or max(1, round(min(image.size) / 300))
    font = _load_font(max(11, round(min(image.size) / 36)))
    clipped = [_clip(box, image) for box in boxes]
    visible = [i for i in reversed(range(len(boxes))) if clipped[i] is not None]
    for i in visible:
        canvas.rectangle(clipped[i], outline=colours[i], width=width)
    for i in visible if texts else ():
        _draw_plate(canvas, clipped[i][:2], texts[i], colours[i], font)
    return image


def tile_images(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of any sizes in one picture, row by row, on dark ground."""
    width, height = (max(image.size[i] for image in images) + _GAP for i in (0, 1))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), _GROUND)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(image, (column * width, row * height))
    return grid


def _colour_of(label: int) -> Colour:
    """The colour of a class. The hue walks in steps of the golden ratio; every six classes the shade changes."""
    saturation, value = ((0.85, 0.95), (0.95, 0.7), (0.5, 1.0))[label // 6 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * _GOLDEN_RATIO) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _clip(box: Sequence[float], image: Image.Image) -> tuple[float, float, float, float] | None:
    """The part of a box that lies in the image, or None."""
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], image.width - 1), min(box[3], image.height - 1)
    return (x0, y0, x1, y1) if x1 >= x0 and y1 >= y0 else None


def _draw_plate(
    canvas: ImageDraw.ImageDraw, corner: Sequence[float], text: str, colour: Colour, font: ImageFont.FreeTypeFont
) -> None:
    """A text on a coloured ground, above the corner of a box; where that is outside the image, moved inside."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    pad = max(1, font.size // 8)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    image_width, image_height = canvas.im.size
    x = max(0, min(corner[0], image_width - width))
    y = max(0, min(corner[1] - height, image_height - height))
    canvas.rectangle((x, y, x + width, y + height), fill=colour)
    canvas.text((x + pad - left, y + pad - top), text, fill=_text_colour(colour), font=font)


def _text_colour(ground: Colour) -> Colour:
    """Black or white, whichever is easier to read on `ground` (relative luminance of ITU-R BT.601)."""
    red, green, blue = ground
    return _DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _LIGHT


@lru_cache(maxsize=8)
def _load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, `size` pixels high: it has Latin, Greek, Cyrillic and more."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
