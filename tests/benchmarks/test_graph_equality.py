"""Comparison of graphs for equal tokens, and of pictures with their padding."""

import numpy as np
import pytest
import torch

from dino.export.export_wrapper import ExportWrapper, Prepared
from dino.export.verify_batches import delicate_ends
from dino.modeling.detector import Detector

from ..tiny import tiny_network
from ..tools.programs import load_program
from ..weights.states import randomise


@pytest.fixture
def program():
    return load_program("graph_equality", "benchmarks")


@pytest.fixture
def wrapper(program):
    torch.manual_seed(0)
    return program.AllQueries(ExportWrapper(Detector(randomise(tiny_network()), names=list("abc")))).eval()


def test_batches_are_drawn_with_delicate_ones(program):
    drawn = program.draw(60, 65, 300, lambda side: [-(-side // 8), -(-side // 32)], np.random.default_rng(0))
    assert [delicate for delicate, _, _ in drawn] == [False, True] * 30
    assert {len(sizes) for *_, sizes in drawn} == {1, 2, 3, 4}
    for delicate, (height, width), sizes in drawn:
        assert (sizes >= 1).all()
        assert (sizes <= [height, width]).all()
        if len(sizes) > 1:
            assert sizes[0].tolist() == [height, width]
        if delicate:
            ends = {end + step for n in (8, 32) for end in delicate_ends(height, -(-height // n)) for step in (0, 1)}
            assert {int(height) for height, _ in sizes[len(sizes) > 1 :]} <= ends


def test_other_tokens_are_fed_to_the_network(program, wrapper):
    """An engine that takes two tokens in the other order is no failure of its boxes."""
    random = np.random.default_rng(0)
    sizes = np.array([[96, 128], [80, 60]])
    inputs = program.fill((96, 128), sizes, program.read_pictures(None, random), random)
    expected = program.run_torch(wrapper, "reference", *inputs)
    row = program.compare(wrapper, expected, expected, inputs)
    assert row == {"box": 0, "score": 0, "other_tokens": 0, "tie": 0}

    wrapper.fed = torch.from_numpy(expected[2]).clone()
    wrapper.fed[1, :2] = wrapper.fed[1, :2].flip(0)
    other = program.run_torch(wrapper, "reference", *inputs)
    wrapper.fed = None
    program.run_torch(wrapper, "reference", *inputs)
    assert np.abs(other[0] - expected[0]).max() > program.BOX_BOUND
    row = program.compare(wrapper, expected, other, inputs)
    assert (row["box"], row["score"], row["other_tokens"]) == (0, 0, 1)
    assert row["tie"] > 0

    moved = program.compare(wrapper, expected, [expected[0] + 1, *expected[1:]], inputs)
    bounds = {"box": program.BOX_BOUND, "score": program.SCORE_BOUND}
    assert program.beyond(moved, bounds)
    assert not program.beyond(row, bounds)
    assert program.beyond(row | {"box": float("nan")}, bounds)


def test_canvases_of_padding():
    padded = load_program("padding", "benchmarks").padded
    inputs = Prepared(np.ones((1, 3, 100, 120), np.uint8), np.array([[100, 120]]))
    assert padded(inputs, 1.25, 1).images.shape == (1, 3, 125, 150)
    wide = padded(inputs, 1.0, 64)
    assert wide.images.shape == (1, 3, 128, 128)
    assert wide.images.sum() == inputs.images.sum()
    assert wide.sizes.tolist() == [[100, 120]]
