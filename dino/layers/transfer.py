"""Small tensors on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on `device`, where nothing can be copied from the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: Tensor | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor, or numbers, of the host -> a tensor on `device`, without waiting for what the device does.

    PyTorch waits for the device in an ordinary copy. The driver has taken over memory that is not pinned when the call
    returns, so that the host may change it afterwards.
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)
