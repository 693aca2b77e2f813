import itertools
import random

import pytest

from dino.inference.label_placement import place_labels


def crowd(count, width, height, seed=0):
    rng = random.Random(seed)
    boxes = []
    for _ in range(count):
        x, y = rng.uniform(0, width - 2), rng.uniform(0, height - 2)
        boxes.append((x, y, rng.uniform(x, width - 1), rng.uniform(y, height - 1)))
    return boxes


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("size", [(20, 12), (64, 64), (320, 240), (1280, 720), (3000, 60)])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_labels_lie_inside_and_on_no_other(size, count):
    boxes = crowd(count, *size)
    texts = [f"{'a rather long name ' * (k % 3)}class {k} 0.{k}" for k in range(count)]
    plates, note = place_labels(size, boxes, texts, 14)
    places = [plate.place for plate in plates] + ([note.place] if note else [])
    assert all(0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] for x0, y0, x1, y1 in places)
    assert not any(overlap(*pair) for pair in itertools.combinations(places, 2))
    assert place_labels(size, boxes, texts, 14) == (plates, note)
    left_out = count - len(plates)
    if note:
        assert str(left_out) in note.text
    else:
        assert not left_out or size[0] < 64


def test_many_labels_do_not_hide_the_picture():
    plates, note = place_labels((640, 480), crowd(300, 640, 480), ["something 0.50"] * 300, 12)
    covered = sum((x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1), *_ in plates)
    assert 0.15 < covered / (640 * 480) < 0.3
    assert note.text == f"{300 - len(plates)} more without label"


def test_labels_of_one_place_stand_around_it():
    box = (100, 100, 160, 130)
    plates, note = place_labels((400, 300), [box] * 5, ["name 0.50"] * 5, 12)
    assert len(plates) == 5
    assert note is None
    assert plates[0].place[3] == 100  # the first one stands above its box
    assert plates[0].place[0] == 100


def test_a_label_that_finds_no_room_becomes_smaller():
    plates, _ = place_labels((170, 40), [(0, 0, 169, 39)] * 12, ["name 0.50"] * 12, 16)
    sizes = [plate.font.size for plate in plates]
    assert sizes[0] == 16
    assert min(sizes) == 12


def test_long_names_keep_their_score():
    [plate], _ = place_labels((300, 200), [(10, 50, 250, 190)], ["x" * 300 + " 0.87"], 14)
    assert plate.text.endswith(" 0.87")
    assert "…" in plate.text
    assert len(plate.text) <= 36


def test_boxes_outside_have_no_label():
    plates, note = place_labels((300, 200), [None, (10, 50, 250, 190)], ["a", "b"], 14)
    assert [plate.text for plate in plates] == ["b"]
    assert note is None
