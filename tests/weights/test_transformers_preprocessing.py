import json

import pytest

from dino.modeling.detector import Preprocessing
from dino.utils.files import DataError
from dino.weights.transformers_preprocessing import from_processor, to_processor

USUAL = Preprocessing()
OTHERS = [
    USUAL,
    Preprocessing((127.5,) * 3, (1.0, 255.0, 0.001), 288, None, 20, (0.0, 4095.0)),
    Preprocessing((103.5301, -12.123456, 0.33333333), (57.375, 1e4, 58.123456789), 1, 1, 1),
]


@pytest.mark.parametrize("preprocessing", OTHERS)
def test_there_and_back(preprocessing):
    fields = json.loads(json.dumps(to_processor(preprocessing, [3, 1])))
    found = from_processor(fields)
    as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocessing._asdict().items()}
    assert found == as_lists


def test_the_usual_numbers_are_written_as_people_write_them():
    fields = to_processor(USUAL, [1])
    assert fields["image_mean"] == [0.485, 0.456, 0.406]
    assert fields["image_std"] == [0.229, 0.224, 0.225]
    assert fields["rescale_factor"] == 1 / 255
    assert "input_range" not in fields


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"do_normalize": False}, {"pixel_mean": [0.0] * 3, "pixel_std": [255.0] * 3}),
        ({"do_normalize": False, "do_rescale": False}, {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}),
        (
            {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [50, 50, 50]},
            {"pixel_mean": [100.0, 110.0, 120.0], "pixel_std": [50.0] * 3},
        ),
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            {"pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3},
        ),
        ({"size": {"shortest_edge": 480}}, {"short_side": 480, "max_size": None}),
        ({"size": None, "image_mean": None, "resample": None, "do_pad": False}, {}),
    ],
)
def test_other_processors(fields, expected):
    usual = {"pixel_mean": list(USUAL.pixel_mean), "pixel_std": list(USUAL.pixel_std)}
    found = from_processor(fields)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == USUAL._asdict() | usual | expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_resize": False}, "do_resize is not true"),
        ({"resample": 3}, "resample is 3: only bilinear, 2"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean is"),
        ({"image_std": 0.5}, "image_std is 0.5: a list of three numbers was expected"),
        ({"size": 800}, "size is 800: shortest_edge and longest_edge were expected"),
        ({"size": {"height": 800, "width": 800}}, "size is"),
        ({"size": {"max_height": 800, "max_width": 800}}, "size is"),
    ],
)
def test_what_a_detector_does_not_do(fields, message):
    with pytest.raises(DataError, match=message):
        from_processor(fields)
