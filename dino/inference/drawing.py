"""Boxes drawn on pictures, with labels that can be read on any ground, and grids of pictures with a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from PIL import Image, ImageDraw

from .fonts import legible, load_font
from .label_placement import Plate, Rectangle, place_labels
from .palette import Colour, colour_of, ink_on

_GROUND, _INK, _SOFT, _GAP = (24, 26, 30), (236, 239, 244), (164, 172, 182), 6  # of a grid; the gap in pixels
_NOTE = (24, 26, 30)  # ground of the note about labels that are left out
_LEAST_FONT, _EDGE = 12, 120  # pixels; opacity of the edge of a box, of 255


def draw_detections(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """A copy of an RGB image with detections in the colours of their classes, the first ones on top.

    Args:
        boxes: see `draw_boxes`.
        labels: of the classes, which choose the colours.
        texts: what the boxes are called.
    """
    return draw_boxes(image, boxes, [colour_of(label) for label in labels], texts)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    colours: Sequence[Colour],
    texts: Sequence[str] = (),
    *,
    width: int | None = None,
    dash: int = 0,
) -> Image.Image:
    """A copy of an RGB image with boxes, the first ones on top.

    Labels never cover each other: they move around their box, shrink, or are left out and counted in the corner.

    Args:
        boxes: xyxy in pixels. What reaches out of the image is cut off at its border; boxes that lie outside, or have
            their sides inverted, are left out.
        colours: one for each box.
        texts: one for each box; empty for none.
        width: of a line in pixels; None for one that suits the image.
        dash: length of dashes in pixels; 0 for solid lines.
    """
    image = image.copy()
    canvas = ImageDraw.Draw(image, "RGBA")
    side = (image.width * image.height) ** 0.5
    width = width or max(1 if side < 150 else 2, round(side / 300))
    clipped = [_clip(box, image) for box in boxes]
    for box, colour in reversed([*zip(clipped, colours, strict=True)]):
        if box is not None:
            _draw_box(canvas, box, colour, width, dash)
    plates, note = place_labels(image.size, clipped, texts, _font_size(side, clipped)) if texts else ([], None)
    for plate in plates:
        _draw_plate(canvas, plate, colours[plate.index])
    if note:
        _draw_plate(canvas, note, _NOTE)
    return image


def _font_size(side: float, boxes: Sequence[Rectangle | None]) -> int:
    """Pixels of the labels' font: of the picture's size, smaller for many boxes and for small ones."""
    heights = [box[3] - box[1] for box in boxes if box is not None]
    size = side / 38 * min(1, 20 / max(len(heights), 1)) ** 0.25
    return max(_LEAST_FONT, round(min(size, max(side / 75, 0.3 * median(heights or [0])))))


def fit(image: Image.Image, width: int, height: int) -> tuple[Image.Image, float]:
    """An image at the largest size inside `width` x `height` pixels, and its scale; at most four times as large."""
    scale = min(width / image.width, height / image.height, 4)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC), scale


def arrange(
    rows: Sequence[Sequence[Image.Image]],
    title: str,
    heads: Sequence[str] = (),
    legend: Mapping[str, Colour] | None = None,
) -> Image.Image:
    """Pictures of any sizes in rows below a title, on dark ground.

    Args:
        rows: of pictures; the last ones may be shorter.
        heads: above the columns, repeated as often as they fit; empty for none.
        legend: what the colours mean, below the pictures.
    """
    width = max(image.width for row in rows for image in row)
    group = len(heads) or max(map(len, rows))  # columns between two wider gaps
    lefts = [_GAP + i * (width + _GAP) + 2 * _GAP * (i // group) for i in range(max(map(len, rows)))]
    whole = lefts[-1] + width + _GAP
    size = max(_LEAST_FONT, round(whole / 90))
    inner = whole - 2 * _GAP
    bars = [_row_bar([_text_bar(inner, title, round(1.2 * size), _INK)], [_GAP], inner, whole)]
    if heads:
        texts = [_text_bar(width, heads[column % group], size, _SOFT) for column in range(len(lefts))]
        bars.append(_row_bar(texts, lefts, width, whole))
    bars += [_row_bar(row, lefts, width, whole) for row in rows]
    if legend:
        bars.append(_legend_bar(whole, legend, size))
    return _stack(bars)


def _row_bar(images: Sequence[Image.Image], lefts: Sequence[int], width: int, whole: int) -> Image.Image:
    """Pictures side by side, each in the middle of its column of `width` pixels, and a gap below them."""
    bar = Image.new("RGB", (whole, max(image.height for image in images) + _GAP), _GROUND)
    for image, left in zip(images, lefts, strict=False):
        bar.paste(image, (left + (width - image.width) // 2, 0))
    return bar


def _stack(bars: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    page = Image.new("RGB", (bars[0].width, sum(bar.height for bar in bars)), _GROUND)
    top = 0
    for bar in bars:
        page.paste(bar, (0, top))
        top += bar.height
    return page


def _text_bar(width: int, text: str, size: int, ink: Colour) -> Image.Image:
    """One line of text, shortened to the width."""
    bar = Image.new("RGB", (width, round(1.7 * size)), _GROUND)
    line = _shorten(text, width, size)
    ImageDraw.Draw(bar).text((0, round(1.3 * size)), line, fill=ink, font=load_font(line, size), anchor="ls")
    return bar


def _legend_bar(width: int, legend: Mapping[str, Colour], size: int) -> Image.Image:
    """Colours and what they mean, in as many lines as they need."""
    places, x, y = [], _GAP, 0
    for text, colour in legend.items():
        line = _shorten(text, width - 2 * size - 2 * _GAP, size)
        needed = round(2 * size + load_font(line, size).getlength(line))
        if x > _GAP and x + needed > width - _GAP:
            x, y = _GAP, y + round(1.7 * size)
        places.append((x, y, line, colour))
        x += needed + size
    bar = Image.new("RGB", (width, y + 2 * size), _GROUND)
    canvas = ImageDraw.Draw(bar)
    for x, y, line, colour in places:
        canvas.rectangle((x, y + round(0.5 * size), x + size, y + round(1.5 * size)), colour, ink_on(colour))
        canvas.text((x + 1.5 * size, y + 1.4 * size), line, fill=_INK, font=load_font(line, size), anchor="ls")
    return bar


def _shorten(text: str, width: float, size: int) -> str:
    """The text, or so much of its start and end as fits into `width` pixels."""
    limit = len(text)
    line = legible(text)
    while limit > 3 and load_font(line, size).getlength(line) > width:
        limit -= max(1, limit // 10)
        line = legible(text, max(limit, 3))
    return line


def _clip(box: Sequence[float], image: Image.Image) -> Rectangle | None:
    """The part of a box that lies in the image, or None."""
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], image.width - 1), min(box[3], image.height - 1)
    return (x0, y0, x1, y1) if x1 >= x0 and y1 >= y0 else None


def _draw_box(canvas: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, width: int, dash: int) -> None:
    """An outline inside the box, with a thin edge of the opposite lightness outside."""
    x0, y0, x1, y1 = box
    edge = max(1, width // 3)
    canvas.rectangle((x0 - edge, y0 - edge, x1 + edge, y1 + edge), outline=(*ink_on(colour), _EDGE), width=edge)
    if not dash:
        canvas.rectangle(box, outline=colour, width=width)
        return
    for x in range(int(x0), int(x1) + 1, 2 * dash):
        for top in (y0, max(y0, y1 - width + 1)):
            canvas.rectangle((x, top, min(x + dash - 1, x1), min(top + width - 1, y1)), fill=colour)
    for y in range(int(y0), int(y1) + 1, 2 * dash):
        for left in (x0, max(x0, x1 - width + 1)):
            canvas.rectangle((left, y, min(left + width - 1, x1), min(y + dash - 1, y1)), fill=colour)


def _draw_plate(canvas: ImageDraw.ImageDraw, plate: Plate, ground: Colour) -> None:
    """A text on its ground."""
    x0, y0, x1, y1 = plate.place
    canvas.rectangle((x0, y0, x1 - 1, y1 - 1), fill=ground)
    canvas.text(plate.anchor, plate.text, fill=ink_on(ground), font=plate.font, anchor="ls")
