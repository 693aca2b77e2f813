import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dino.explain.canvas import add_legend, add_names, escaped, new_figure, object_colours, show_image


def extents(figure, artists):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    return [artist.get_window_extent(renderer) for artist in artists]


@pytest.mark.parametrize("width", [2.5, 3.2, 6.4, 10.5])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_legends_are_whole(width, count):
    figure, _ = new_figure(width, 4)
    entries = {f"level {k} (100 x 152 cells)": "#2274a5" for k in range(count)}
    add_legend(figure, entries)
    [legend] = figure.legends
    [box] = extents(figure, [legend])
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y0 >= 0
    assert [text.get_text() for text in legend.get_texts()] == list(entries)


def test_names_lie_inside_and_on_no_other():
    figure, ((axes,),) = new_figure(3, 2.4)
    show_image(axes, np.zeros((200, 300, 3)))
    boxes = np.array([[10.0 * k, 8.0 * k, 10 * k + 60, 8 * k + 50] for k in range(-2, 20)])
    add_names(axes, boxes, object_colours(len(boxes)), ["raccoon 0.32"] * len(boxes), 2.8)
    texts = extents(figure, axes.texts)
    assert len(texts) > 5
    frame = axes.get_window_extent()
    assert all(frame.x0 - 2 <= box.x0 and box.x1 <= frame.x1 + 2 for box in texts)
    assert not any(
        one.shrunk(0.95, 0.8).overlaps(other.shrunk(0.95, 0.8)) for one, other in itertools.combinations(texts, 2)
    )


def test_names_are_no_formulas():
    assert escaped("$x$\n") == r"\$x\$\n"
    assert len(escaped("x" * 99, 14)) == 14
