"""TensorFloat-32 is off, whatever the process says; in the end, how much of the allowed difference is used up."""

import pytest
import torch

from .golden import worst_margins


@pytest.fixture(autouse=True)
def float32():
    """The numbers of the official program were computed in it."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


def pytest_terminal_summary(terminalreporter):
    for number, (margin, name) in sorted(worst_margins.items()):
        terminalreporter.write_line(f"golden {number}: at most {margin:.2f} of the allowed difference ({name})")
