"""Kinds of pictures that a `Predictor` takes, and what it says of all else. `test_predictor.py` has files and lists."""

import numpy as np
import pytest
import torch

from dino.data.images import read_image
from dino.inference.picture_inputs import list_sources, to_pixels
from dino.utils.files import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def pixels_of(source, channels="RGB"):
    return to_pixels(source, channels, read_image)


def test_bgr_is_said_of_arrays_and_tensors():
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for source in (PIXELS, tensor, tensor.float() / 255, tensor.half() / 255):
        assert np.array_equal(pixels_of(source), PIXELS)
        assert np.array_equal(pixels_of(source, "BGR"), PIXELS[:, :, ::-1])
        assert pixels_of(source, "BGR").flags["C_CONTIGUOUS"]
    assert np.array_equal(pixels_of((tensor / 255).requires_grad_()), PIXELS)


def test_batches():
    batch = np.stack([PIXELS, PIXELS[::-1]])
    assert [np.array_equal(one, other) for one, other in zip(list_sources(batch), batch, strict=True)] == [True] * 2
    tensors = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2)
    assert [tuple(one.shape) for one in list_sources(tensors)] == [(3, 6, 5)] * 2
    assert len(list(list_sources([batch, PIXELS, tensors[0]]))) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no pictures: an empty list was given"),
        ((), "an empty tuple"),
        ([PIXELS, []], "an empty list"),
        (np.zeros((0, 6, 5, 3), np.uint8), "an empty ndarray"),
        (torch.zeros(0, 3, 6, 5), "an empty Tensor"),
        (PIXELS / 255, r"float64\. Floats in \[0, 1\] become uint8 by"),
        (PIXELS.astype(np.float32), r"float32\. Floats in \[0, 1\] become uint8 by"),
        (PIXELS.astype(np.uint16), r"uint16\. Scale its values to 0 … 255"),
        (PIXELS.transpose(2, 0, 1), r"Channels come last: array.transpose\(1, 2, 0\)"),
        (np.zeros((6, 5, 4), np.uint8), r"Leave the fourth channel out: array\[:, :, :3\]"),
        (np.zeros((2, 6, 5, 4), np.uint8), r"\(6, 5, 4\) of uint8"),
        (np.zeros(5, np.uint8), r"\(5,\) of uint8"),
        (torch.zeros(6, 5, 3), r"Channels come first: tensor.permute\(2, 0, 1\)"),
        (
            torch.from_numpy(PIXELS).permute(2, 0, 1).float(),
            r"values from \d to 2\d\d\. Values from 0 to 255 must be uint8",
        ),
        (torch.full((3, 6, 5), -1.5), r"not be normalised, but has values from -1.5 to -1.5"),
        (torch.full((3, 6, 5), torch.nan), "from nan to nan"),
        (torch.zeros(3, 6, 5, dtype=torch.bool), "not torch.bool"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        list(map(pixels_of, list_sources(given)))
