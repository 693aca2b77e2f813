import numpy as np
import pytest
from PIL import Image

from dino.inference import drawing
from dino.inference.drawing import arrange, draw_boxes, draw_detections, fit
from dino.inference.palette import colour_of, contrast

RED, BLUE = (255, 0, 0), (0, 0, 255)


def grey(width=60, height=40):
    return Image.new("RGB", (width, height), (128, 128, 128))


def where(image, colour):
    """xyxy around the pixels of a colour, the last ones included; None if there are none."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


def test_boxes_are_drawn_on_a_copy():
    image = grey()
    drawn = draw_boxes(image, [[10, 5, 30, 25], [40, 10, 50, 30]], [RED, BLUE])
    assert image.getcolors() == [(60 * 40, (128, 128, 128))]
    assert where(drawn, RED) == (10, 5, 30, 25)
    assert where(drawn, BLUE) == (40, 10, 50, 30)
    assert drawn.getpixel((20, 15)) == (128, 128, 128)


def test_boxes_end_at_the_border_and_those_outside_are_left_out():
    drawn = draw_boxes(grey(), [[-9, 5, 30, 99]], [RED])
    assert where(drawn, RED) == (0, 5, 30, 39)
    for outside in ([70, 5, 90, 20], [5, -20, 20, -3], [30, 5, 10, 20]):  # the last one is inverted
        assert where(draw_boxes(grey(), [outside], [RED], ["x"]), RED) is None


def test_the_first_box_is_on_top():
    drawn = draw_boxes(grey(), [[10, 10, 30, 30], [10, 10, 30, 30]], [RED, BLUE])
    assert where(drawn, BLUE) is None


@pytest.mark.parametrize(("ground", "least"), [(0, 3), (100, 2), (255, 3)])
def test_a_box_is_seen_on_any_ground(ground, least):
    """Its line, or the edge of its line, has contrast with the ground; WCAG asks for 3 where the ground is plain."""
    image = Image.new("RGB", (160, 160), (ground,) * 3)
    for label in range(60):
        drawn = draw_detections(image, [[20, 20, 90, 90]], [label], [""])
        assert max(contrast(colour, (ground,) * 3) for _, colour in drawn.getcolors()) >= least, label


def test_lines_and_labels_suit_the_size():
    def heights(side, count=1):
        boxes = [[0.3 * side, 0.3 * side, 0.6 * side, 0.7 * side]] * count
        clipped = [tuple(box) for box in boxes]
        return drawing._font_size(side, clipped)

    assert heights(320) == 12
    assert heights(1600) == 42
    assert heights(8000) == 211
    assert heights(1600, count=100) < heights(1600)


def test_dashes_have_gaps_in_which_the_edge_is_seen():
    drawn = np.asarray(draw_boxes(grey(200, 160), [[20, 20, 180, 140]], [RED], dash=6))
    row = (drawn[20, 20:181] == RED).all(-1)
    assert row[:6].all()
    assert not row[6:12].any()
    assert (drawn[19, 20:181] != 128).any()  # the edge


def test_drawing_is_deterministic():
    boxes = [[5 * k, 3 * k, 5 * k + 60, 3 * k + 40] for k in range(20)]
    one, other = (draw_detections(grey(300, 200), boxes, range(20), ["name 0.50"] * 20) for _ in range(2))
    assert one.tobytes() == other.tobytes()


def test_values_that_are_no_numbers_are_left_out():
    nan = float("nan")
    drawn = draw_boxes(grey(), [[nan, 5, 30, 25], [5, 5, nan, 25]], [RED, RED], ["a", "b"])
    assert where(drawn, RED) is None


def test_a_picture_is_fitted_and_not_enlarged_too_far():
    assert fit(grey(100, 50), 200, 200)[0].size == (200, 100)
    assert fit(grey(8000, 10), 200, 200)[0].size == (200, 1)
    image, scale = fit(grey(10, 10), 400, 400)
    assert image.size == (40, 40)
    assert scale == 4


def test_texts_stay_inside_the_image():
    drawn = draw_boxes(grey(120, 60), [[0, 0, 20, 20], [110, 40, 119, 59]], [RED, BLUE], ["first", "second"])
    assert where(drawn, RED)[2] > 22  # the plate is wider than its box
    assert where(drawn, BLUE)[0] < 100
    assert where(drawn, BLUE)[2] == 119


def test_detections_have_the_colours_of_their_classes():
    drawn = draw_detections(grey(), [[10, 20, 30, 35], [40, 20, 50, 35]], [0, 7], ["", ""])
    assert where(drawn, colour_of(0)) is not None
    assert where(drawn, colour_of(7)) is not None


def test_images_of_different_sizes_side_by_side():
    red, blue = Image.new("RGB", (10, 20), RED), Image.new("RGB", (30, 5), BLUE)
    grid = arrange([[red, blue], [red]], "a title", ["left", "right"], {"something": (1, 2, 3)})
    x0, y0, x1, y1 = where(grid, BLUE)
    assert (x1 - x0, y1 - y0) == (29, 4)
    left, top, right, bottom = where(grid, RED)
    assert right - left == 9
    assert bottom - top == 19 + 20 + 6  # two rows and the gap between them
    assert right < x0
    assert top == y0
    assert where(grid, (1, 2, 3))[1] > bottom  # the legend lies below
