"""Small tensors on their way between host and device, without a wait for other work of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STAGED = 2**16  # bytes that CUDA's driver takes over at once; for more it may wait for the stream


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on `device`, where nothing can be copied from the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: Tensor | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor, or numbers, of the host -> a tensor on `device`, without waiting for what the device does.

    The host may change `values` afterwards, unless they are a tensor in pinned memory: PyTorch waits for the device in
    an ordinary copy, and in this one the driver has taken over other memory when the call returns.
    """
    values = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > STAGED:
        values = values.pin_memory()  # no copy if it is pinned; PyTorch keeps such memory until it has been read
    return values.to(device, non_blocking=True)


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy `x` to the host.

    Returns:
        a function that waits for the copy, but for nothing that the device was given later, and returns it.
    """
    if not x.is_cuda:
        copy = x.cpu()
        return lambda: copy
    copy = x.to("cpu", non_blocking=True)  # in pinned memory
    copied = torch.cuda.current_stream(x.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
