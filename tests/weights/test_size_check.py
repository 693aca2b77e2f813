import pytest
import torch
from torch import nn

from dino.utils.files import DataError
from dino.weights.size_check import SizeGuard, check_size


def weights(*sizes):
    return {f"{i}.weight": torch.zeros(size) for i, size in enumerate(sizes)}


def test_a_network_of_the_same_size_passes_and_takes_no_memory():
    built = []
    assert check_size(lambda: built.append(nn.Linear(2000, 2000)) or built[0], weights(4_000_000))
    assert built[0].weight.device.type == "meta"


def test_a_larger_network_is_refused():
    with pytest.raises(DataError, match=r"4,002,000 numbers, but the weights only 10; .* weight is \(2000, 2000\)"):
        check_size(lambda: nn.Linear(2000, 2000), weights(10))


def test_huge_tensors_are_refused():
    with pytest.raises(DataError, match=r"far more than the file has, up to a tensor of shape \(1000000, 1000000\)"):
        check_size(lambda: nn.Linear(10**6, 10**6), weights(10))


def test_many_layers_are_refused():
    made = []

    def build():
        made.extend(nn.Linear(1, 1) for _ in range(10**6))

    with pytest.raises(DataError, match="more layers than the file has weights for"):
        check_size(build, weights(10))
    assert len(made) < 10_000


def test_numbers_of_a_line_can_be_read():
    assert check_size(lambda: nn.Dropout(torch.linspace(0, 0.5, 3)[1].item()), {})
    with pytest.raises(DataError, match=r"a line of 1,000,000,000 numbers"):
        check_size(lambda: nn.Dropout(torch.linspace(0, 0.5, 10**9)[1].item()), {})


def test_a_network_that_reads_numbers_can_not_be_compared():
    assert not check_size(lambda: nn.Dropout(torch.zeros(2).sum().item()), {})
    with pytest.raises(DataError, match="far more than the file has"), SizeGuard({}):
        [torch.empty(2**26) for _ in range(3)]


def test_errors_of_the_network_pass_through():
    with pytest.raises(ZeroDivisionError):
        check_size(lambda: nn.Dropout(1 / 0), {})
