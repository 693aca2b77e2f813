"""The augmentations without Detectron2 give the pixels and boxes of Detectron2's, from the same random numbers."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
from detectron2.data import transforms as T

from dino.d2 import data_loading
from dino.data.augmentations import BY_NAME, Augmentations

CASES = {
    "RandomBrightness": [{"intensity_min": 0.6, "intensity_max": 1.6}],
    "RandomContrast": [{"intensity_min": 0.6, "intensity_max": 1.6}],
    "RandomCrop": [
        {"crop_type": "absolute", "crop_size": (40, 300)},
        {"crop_type": "absolute_range", "crop_size": (30, 70)},
        {"crop_type": "relative", "crop_size": (0.7, 0.5)},
        {"crop_type": "relative_range", "crop_size": (0.3, 0.6)},
    ],
    "RandomExtent": [{"scale_range": [0.5, 1.8], "shift_range": [0.4, 0.2]}],
    "RandomFlip": [{}, {"prob": 0.9, "horizontal": False, "vertical": True}],
    "RandomSaturation": [{"intensity_min": 0.2, "intensity_max": 1.8}],
    "ResizeShortestEdge": [
        {"short_edge_length": (30, 90), "max_size": 100},
        {"short_edge_length": [32, 64, 128], "sample_style": "choice"},
        {"short_edge_length": 0},
        {"short_edge_length": 50},
    ],
    "ShortSide": [{"sizes": [31, 57, 90], "max_size": 100}, {"sizes": [40]}],
}


def draw(seed):
    numbers = np.random.default_rng(seed)
    height, width = numbers.integers(40, 90, 2)
    corners = numbers.uniform(0, 1, (5, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    return numbers.integers(0, 256, (height, width, 3), dtype=np.uint8), boxes


def compare(theirs, ours):
    """On several images, until both have drawn the same numbers."""
    for seed in range(6):
        image, boxes = draw(seed)
        aug_input = T.AugInput(image.copy())
        np.random.seed(seed)
        expected = theirs(aug_input).apply_box(boxes.copy())
        drawn = np.random.rand()
        np.random.seed(seed)
        pixels, found = ours(image, boxes)
        assert np.random.rand() == drawn
        np.testing.assert_array_equal(pixels, aug_input.image)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def theirs_by_name(name):
    return getattr(data_loading, name, None) or getattr(T, name)


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in CASES for options in CASES[name]])
def test_same_pixels_and_boxes(name, options):
    compare(theirs_by_name(name)(**options), BY_NAME[name](**options))


def test_a_choice_of_several():
    branches = [
        [],
        [("RandomFlip", {}), ("RandomContrast", CASES["RandomContrast"][0])],
        [("ShortSide", {"sizes": [9]})],
    ]
    theirs = data_loading.OneOf([[theirs_by_name(name)(**options) for name, options in b] for b in branches])
    ours = BY_NAME["OneOf"]([[BY_NAME[name](**options) for name, options in b] for b in branches])
    compare(T.AugmentationList([T.RandomFlip(), theirs]), Augmentations([BY_NAME["RandomFlip"](), ours]))


def test_every_augmentation_is_compared():
    assert {*CASES, "OneOf"} == set(BY_NAME)
