"""Memory stays flat over predictions of changing sizes: the slope of a straight line through samples is bounded."""

import numpy as np
import pytest

from ..inference.test_predictor import tiny
from ..tools.programs import load_program

memory = load_program("memory", "benchmarks")
MOST = 1000  # bytes for each prediction
SOME = 120, 10, 60, 1, [(40, 60), (60, 40), (64, 64), (50, 90), (90, 52)]  # five sizes
needs_glibc = pytest.mark.skipif(memory.bytes_now()[0] is None, reason="the C library does not count its memory")


def test_a_leak_is_found():
    """200 bytes for each prediction beside noise of 100 kB; none has a slope within its margin of 0."""
    numbers = np.arange(0, 3001, 50)
    noise = np.random.default_rng(0).normal(0, 100_000, len(numbers))
    leaking, flat = memory.fit(numbers, 5e8 + 200 * numbers + noise), memory.fit(numbers, 5e8 + noise)
    assert leaking.slope - leaking.margin > 0
    assert abs(leaking.slope - 200) < leaking.margin < 100
    assert abs(flat.slope) < flat.margin


def test_pictures_change_their_size_and_repeat_with_their_seed():
    shapes = [x.shape for x in memory.pictures(20, 0)]
    assert len(set(shapes)) > 15
    assert shapes == [x.shape for x in memory.pictures(20, 0)]


@pytest.mark.parametrize("threads", [1, 3])
def test_samples(threads):
    seen = []
    numbers, values = memory.sample(lambda x: seen.append(x.shape), 10, 5, 7, threads)
    assert numbers == [0, 5, 10]
    assert len(seen) == 17
    assert all(resident > 2**20 for _, resident in values)


def slope(predictor, *options):
    """Of the bytes that the C library has given out."""
    numbers, values = memory.sample(predictor, *options)
    return memory.fit(numbers, [given for given, _ in values])


@needs_glibc
def test_kept_results_are_found():
    """Results of ten objects: 240 bytes, and the tensors around them."""
    predictor, kept = tiny(), []
    line = slope(lambda x: kept.append(predictor(x).boxes), *SOME)
    assert line.slope > 100


@needs_glibc
def test_memory_of_some_predictions_is_flat():
    line = slope(tiny(), *SOME)
    assert line.slope + line.margin < MOST


@needs_glibc
@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 8])
def test_memory_of_3000_predictions_is_flat(threads):
    sizes = [x.shape[:2] for x in memory.pictures(40, 1)]
    line = slope(memory.small_predictor(), 3000, 50, 500, threads, sizes)
    assert line.slope + line.margin < MOST
