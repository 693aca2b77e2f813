from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.inference.tiling import View, _is_cut, merge, views
from dino.layers import Detections

SIDE = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(SIDE, SIDE, st.integers(32, 2000), st.floats(0, 0.9))
def test_tiles_cover_the_picture_and_overlap(height, width, tile, overlap):
    whole, *tiles = views(height, width, tile, overlap)
    assert whole == View(0, 0, width, height)
    assert bool(tiles) == (max(height, width) > tile)
    for low, high, side in ((0, 2, width), (1, 3, height)):
        spans = sorted({(v[low], v[high]) for v in tiles})
        assert all(b - a == min(tile, side) for a, b in spans)
        if spans:
            assert (spans[0][0], spans[-1][1]) == (0, side)
        for (_, end), (start, _) in pairwise(spans):
            assert end - start >= overlap * tile - 1  # whole pixels


def test_boxes_at_a_cut():
    view = View(100, 0, 200, 100)  # of a picture of 300 x 100: cut at the left and the right
    boxes = torch.tensor([[0.0, 5, 50, 50], [50, 5, 100, 50], [20, 0, 50, 100], [2, 5, 97, 50]])
    assert _is_cut(boxes, view, (100, 300)).tolist() == [True, True, False, False]
    assert not _is_cut(boxes, View(0, 0, 100, 100), (100, 100)).any()


def detections(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def test_merging():
    places = [View(0, 0, 300, 100), View(0, 0, 100, 100), View(80, 0, 180, 100)]
    whole = detections([[10.0, 10, 30, 30], [90, 20, 250, 80]], [0.5, 0.8], [0, 1])
    left = detections([[11.0, 10, 31, 30], [88, 20, 100, 80]], [0.7, 0.9], [0, 1])
    right = detections([[20.0, 50, 40, 60], [20, 50, 40, 60]], [0.6, 0.3], [0, 2])
    found = merge([whole, left, right], places, (100, 300), 0.5)
    assert found.scores.tolist() == pytest.approx([0.8, 0.7, 0.6, 0.3])
    assert found.boxes[2].tolist() == [100, 50, 120, 60]
    assert found.labels.tolist() == [1, 0, 0, 2]


def test_nothing_found():
    empty = detections([], [], [])
    assert merge([empty, empty], [View(0, 0, 9, 9), View(0, 0, 5, 5)], (9, 9), 0.5).boxes.shape == (0, 4)
