"""Settings of all tests: one thread, where two are no faster on small tensors, a fixed seed, one float32 precision."""

import pytest
import torch

from .file_server import server  # noqa: F401

torch.set_num_threads(1)
TF32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # of products, of convolutions


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def float32_precision():
    """A training allows TensorFloat-32 for the whole process, also one in a fixture of a whole module."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = TF32
