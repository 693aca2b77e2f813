"""Detections drawn on a picture: a box, a name and a score, in the colour of the class."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

GOLDEN_RATIO = (5**0.5 - 1) / 2  # hues a step of this apart stay apart, however many there are
DARK, LIGHT = (0, 0, 0), (255, 255, 255)


def draw_detections(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """A copy of an RGB image with detections, the first ones on top.

    Args:
        boxes: xyxy in pixels, may reach out of the image.
        labels: of the classes, which choose the colours.
        texts: what the boxes are called.
    """
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    unit = max(1, round(min(image.size) / 300))  # width of a line, in pixels
    font = load_font(max(11, round(min(image.size) / 36)))
    order = range(len(boxes) - 1, -1, -1)
    for i in order:
        x0, y0, x1, y1 = boxes[i]
        canvas.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour_of(labels[i]), width=unit)
    for i in order:
        draw_plate(canvas, boxes[i][:2], texts[i], colour_of(labels[i]), font)
    return image


def draw_plate(
    canvas: ImageDraw.ImageDraw,
    corner: Sequence[float],
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    """A text on a coloured ground, above the corner of a box; where that is outside the image, moved inside."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    pad = max(1, font.size // 8)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    image_width, image_height = canvas.im.size
    x = max(0, min(corner[0], image_width - width))
    y = max(0, min(corner[1] - height, image_height - height))
    canvas.rectangle((x, y, x + width, y + height), fill=colour)
    canvas.text((x + pad - left, y + pad - top), text, fill=text_colour(colour), font=font)


def colour_of(label: int) -> tuple[int, int, int]:
    """RGB of a class: the hue walks in steps of the golden ratio, and every six classes the shade changes."""
    saturation, value = ((0.85, 0.95), (0.95, 0.7), (0.5, 1.0))[label // 6 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * GOLDEN_RATIO) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on `ground` (relative luminance of ITU-R BT.601)."""
    red, green, blue = ground
    return DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else LIGHT


@lru_cache(maxsize=8)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, `size` pixels high: it has Latin, Greek, Cyrillic and more."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
