import itertools

import pytest

from dino.inference.palette import BLACK, WHITE, colour_of, contrast, hex_of, ink_on


def test_sixty_classes_have_sixty_colours_and_keep_them():
    colours = [colour_of(label) for label in range(60)]
    pairs = itertools.combinations(colours, 2)
    assert min(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 for one, other in pairs) > 35
    assert [colour_of(label + 60) for label in range(60)] == colours


def test_the_first_ten_are_far_apart():
    pairs = itertools.combinations([colour_of(label) for label in range(10)], 2)
    assert min(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 for one, other in pairs) > 70


@pytest.mark.parametrize("ground", [*map(colour_of, range(60)), BLACK, WHITE, (117, 117, 117), (119, 119, 119)])
def test_text_is_readable_on_every_ground(ground):
    assert contrast(ink_on(ground), ground) >= 4.5


def test_contrast_is_that_of_wcag():
    assert contrast(BLACK, WHITE) == 21
    assert contrast((119, 119, 119), WHITE) == pytest.approx(4.48, abs=0.01)
    assert contrast(WHITE, WHITE) == 1
    assert hex_of((1, 171, 255)) == "#01abff"
