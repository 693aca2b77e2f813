"""Both sine codes against the official program."""

import re

import pytest

from dino.layers import SinePositionEncoding
from dino.layers.position_encoding import encode_boxes

from .golden import GoldenFile

golden = GoldenFile("02")


@pytest.mark.parametrize("name", golden.below("pos_"))
def test_position_encoding(name):
    dim, of_y, of_x = re.fullmatch(r"f(\d+)_t(?:H(\d+)_tW)?(\d+)", name).groups()
    temperatures = (float(of_y or of_x), float(of_x))
    encoding = SinePositionEncoding(2 * int(dim), temperatures=temperatures)
    golden.check(f"pos_{name}", encoding(golden["mask"]))


@pytest.mark.parametrize("name", golden.below("sine"))
def test_box_encoding(name):
    coordinates, dim = re.fullmatch(r"(\d)_f(\d+)", name).groups()
    points_or_boxes = golden[{"2": "points2", "4": "boxes4"}[coordinates]]
    golden.check(f"sine{name}", encode_boxes(points_or_boxes, int(dim)))
