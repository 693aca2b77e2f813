"""Whether the network of a description is as large as the weights of its file, before any memory is taken for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dino.utils.files import DataError

_SLACK = 2**20  # numbers that a network may have and its file not: tables computed from sizes
_SPARE = 2**27  # numbers beyond twice the file's while building: a classifier's layer, maps of a black image
_CALLS, _SPARE_CALLS = 60, 20_000  # of PyTorch, for each tensor of the file and beyond; networks here make 8 to 18
_LONGEST = 10_000  # numbers on a line that a network may read one by one, such as drop rates
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}


def check_size(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> bool:
    """Build a network without memory (on the meta device), and compare its size with the weights of its file.

    Args:
        build: makes the network.
        weights: the tensors of the file, under any names.

    Returns:
        whether it could be compared. A network that reads numbers while it is built could not: use a `SizeGuard`.

    Raises:
        DataError: the network has more numbers than the file. Any other error is that of `build`.
    """
    try:
        with torch.device("meta"), SizeGuard(weights):
            network = build()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if not isinstance(error, DataError) and "meta tensor" in str(error):
            return False
        raise
    parts = dict(network.named_parameters()) | dict(network.named_buffers())  # shared ones once
    needed, given = (sum(tensor.numel() for tensor in state.values()) for state in (parts, weights))
    if needed > 1.1 * given + _SLACK:
        shapes = {tensor.shape for tensor in weights.values()}
        name, largest = max(parts.items(), key=lambda part: (part[1].shape not in shapes, part[1].numel()))
        raise DataError(
            f"the description has {needed:,} numbers, but the weights only {given:,}; for example {name} is "
            f"{tuple(largest.shape)} in the description, and the file has "
            + (f"{tuple(weights[name].shape)}" if name in weights else "none of this name")
        )
    return True


class SizeGuard(TorchFunctionMode):
    """Within it, what is built may take a few times the memory and steps that a file's weights explain, and no more.

    Args:
        weights: the tensors of the file.
        spare: numbers beyond twice the file's.
    """

    def __init__(self, weights: Mapping[str, Tensor], spare: int = _SPARE):
        super().__init__()
        self.most = 2 * sum(tensor.numel() for tensor in weights.values()) + spare
        self.most_calls = _CALLS * len(weights) + _SPARE_CALLS
        self.made = self.calls = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func`, and count."""
        self.calls += 1
        if self.calls > self.most_calls:
            raise DataError("the description has more layers than the file has weights for")
        kwargs = dict(kwargs or {})
        if func is torch.linspace and "device" not in kwargs:
            kwargs["device"] = self._device_of_line(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self.made += result.numel() if func in _MAKERS else 0
            if max(self.made, result.numel()) > self.most:
                shape = tuple(result.shape)
                raise DataError(f"the description asks for far more than the file has, up to a tensor of shape {shape}")
        return result

    def _device_of_line(self, start: Any = 0, end: Any = 0, steps: int = 0, **options: Any) -> str:
        """The CPU, where networks may read numbers from a line."""
        if steps > _LONGEST:
            raise DataError(f"the description asks for a line of {steps:,} numbers")
        return "cpu"
