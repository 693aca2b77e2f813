"""Copies of small tensors between host and device that do not wait for other work of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_STAGED = 2**16  # bytes that CUDA's driver copies at once; for more it may wait for the stream


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on `device`, where nothing can be copied from the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: Tensor | Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor or numbers of the host to `device`, without waiting for other work of the device.

    The host may change `values` after the call, unless they are a tensor in pinned memory. The driver has copied other
    memory when the call returns.
    """
    values = _traced(values).to(dtype=dtype) if torch.jit.is_tracing() else torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > _STAGED:
        values = values.pin_memory()  # no copy if pinned already; PyTorch keeps the memory until the device has read it
    return values.to(device, non_blocking=True)


def _traced(values: Tensor | Sequence | int) -> Tensor:
    """Numbers as a tensor; those of a shape stay open in a trace by `torch.jit.trace`."""
    if isinstance(values, (list, tuple)) and values:
        return torch.stack([_traced(value) for value in values])
    return torch.as_tensor(values)


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy `x` to the host.

    Returns:
        a function that waits for the copy and returns it. It does not wait for later work of the device.
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
