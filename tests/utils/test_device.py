"""On the default device: that of the run of tests on a GPU is the GPU."""

import numpy as np
import pytest
import torch

from dino.utils.device import _STAGED, to_device, to_host


@pytest.mark.parametrize("count", [0, 3, _STAGED // 8, _STAGED // 8 + 1, _STAGED])
@pytest.mark.parametrize("pinned", [False, True])
def test_numbers_arrive_whatever_their_number(count, pinned):
    device = torch.empty(0).device
    numbers = torch.arange(count, device="cpu")
    values = numbers.pin_memory() if pinned and device.type == "cuda" else numbers.numpy()
    moved = to_device(values, device, torch.int64)
    if isinstance(values, np.ndarray) and device.type == "cuda":
        values += 1  # the host may
    assert moved.device == device
    assert torch.equal(moved, torch.arange(count))


def test_a_copy_for_the_host_is_of_what_was_there():
    """Work that the device gets afterwards neither delays nor changes it."""
    x = torch.arange(5.0)
    costs = to_host(x * 2)
    y = x.exp().sum()
    assert costs().device.type == "cpu"
    assert costs().tolist() == [0, 2, 4, 6, 8]
    assert y.isfinite()
