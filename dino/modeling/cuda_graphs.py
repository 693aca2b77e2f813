"""CUDA graphs: the kernels of one image size, recorded once, then started by a single call of the host.

With a batch of one, a GPU waits for the host, which starts more than 500 kernels for each image. A replayed graph has
all of them in its queue.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dino.layers.ops.operator import autocast_dtype, requested

from .precision import float32_precision

MOST = 8  # graphs of one network
_REMEMBERED = 1000  # sizes that were seen once


class _Recorder(Protocol):
    """Records the kernels that a function starts on a GPU."""

    def ready(self, images: Tensor) -> bool:
        """Whether a graph of work on `images` can be recorded or replayed now."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run `function` -> (replay, result). `replay()` repeats its work and writes into the same result."""

    def order(self) -> None:
        """Let later work on the current stream wait for the last replay, on whatever stream that was."""


class _CudaRecorder:
    """A `_Recorder` by `torch.cuda.CUDAGraph`. All graphs share one memory pool, as they never run at the same time."""

    def __init__(self):
        self.pool = None
        self.stream: torch.cuda.Stream | None = None  # of the recording
        self.last: torch.cuda.Stream | None = None  # of the last replay

    def ready(self, images: Tensor) -> bool:
        """Whether the images are on a GPU and its stream records no other graph."""
        return images.is_cuda and not torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """As of `_Recorder`. Runs `function` once before, on the same stream, so that libraries initialise there."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of a loader, may allocate and copy meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result

    def order(self) -> None:
        """As of `_Recorder`."""
        stream = torch.cuda.current_stream()
        if self.last is not None and self.last != stream:
            stream.wait_stream(self.last)
        self.last = stream


class _Recorded(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    inputs: tuple[Tensor, Tensor | None]
    replay: Callable[[], None]
    result: Any


class _Storage:
    """Addresses of the parameters and buffers of a network, and its modules: all that a graph depends on.

    Checked before every replay, hence without loops in Python.
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self.tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules) if t]
        self.hooks = [t for m in modules for t in (m._forward_hooks, m._forward_pre_hooks)]
        self.members = list(self.list_members())  # held, so that no other object gets one of their ids
        self.ids = list(map(id, self.members))
        self.tensors = [x for x in self.members if isinstance(x, Tensor)]
        self.pointers = list(map(Tensor.data_ptr, self.tensors))

    def list_members(self) -> Iterator[Any]:
        """Parameters, buffers and modules, as they are now."""
        return chain.from_iterable(map(dict.values, self.tables))

    def unchanged(self) -> bool:
        """Whether all addresses are the same; values may differ."""
        same = list(map(id, self.list_members())) == self.ids
        return same and list(map(Tensor.data_ptr, self.tensors)) == self.pointers

    def hooked(self) -> bool:
        """Whether a module has hooks: a replayed graph would not call them."""
        return any(self.hooks)


class CudaGraphs:
    """Runs the inference of a network, with CUDA graphs for sizes that repeat.

    The first batch of a size runs without a graph. The second one is recorded; it and all later ones are replayed.
    Results are the network's, in new tensors. No graph is used in training, on a CPU, with gradients, with hooks on
    modules, or while another graph is being recorded. A graph sees new values of parameters; if parameters move, as by
    `network.to`, all graphs are dropped. Calls of several threads wait for each other.

    Args:
        network: of (images, padding), such as `DINO`; padding may be None.
        most: number of graphs to keep; the least recently used one is dropped. All share the memory of the largest
            forward pass, and keep it; each has its own inputs and results.
        recorder: records them.

    Raises:
        ValueError: `most` is less than 1.
    """

    def __init__(self, network: nn.Module, *, most: int = MOST, recorder: _Recorder | None = None):
        if most < 1:
            raise ValueError(f"at least one graph must be kept, not {most}")
        self.network = network
        self.most = most
        self.recorder = _CudaRecorder() if recorder is None else recorder
        self.lock = threading.Lock()
        self.storage: _Storage | None = None
        self.seen: OrderedDict[tuple, None] = OrderedDict()
        self.graphs: OrderedDict[tuple, _Recorded] = OrderedDict()
        self.failure = ""  # why recording has stopped

    def __getstate__(self) -> dict[str, Any]:
        """Copies, also in other processes, record their own graphs."""
        return {"network": self.network, "most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without graphs."""
        self.__init__(**state)

    def __call__(self, images: Tensor, padding: Tensor | None) -> Any:
        """Return what `network(images, padding)` returns."""
        if not self.usable(images):
            return self.network(images, padding)
        with self.lock, torch.cuda.device_of(images):
            self.drop_outdated()
            if not self.storage.hooked():
                recorded = self.find(images, padding)
                if recorded:
                    return self.run(recorded, images, padding)
        return self.network(images, padding)

    def usable(self, images: Tensor) -> bool:
        """Whether a graph can serve this call."""
        return (
            not self.failure
            and not self.network.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and self.recorder.ready(images)
        )

    def drop_outdated(self) -> None:
        """Drop all graphs if parameters or modules have been replaced."""
        if self.storage is None or not self.storage.unchanged():
            self.clear()
            self.storage = _Storage(self.network)

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self.graphs.clear()
        self.seen.clear()
        self.storage = None

    def find(self, images: Tensor, padding: Tensor | None) -> _Recorded | None:
        """The graph for such a batch, recorded if this is the second one; None for the first."""
        key = _key_of(images, padding)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        if key not in self.seen:
            self.seen[key] = None
            if len(self.seen) > _REMEMBERED:
                self.seen.popitem(last=False)
            return None
        while len(self.graphs) >= self.most:
            self.graphs.popitem(last=False)
        return self.record(key, images, padding)

    def record(self, key: tuple, images: Tensor, padding: Tensor | None) -> _Recorded | None:
        """Record a graph. If that fails, warn why, and use no graphs from then on."""
        with torch.inference_mode(False):  # tensors made in it could not be written to outside
            inputs = tuple(x if x is None else torch.empty_like(x).copy_(x) for x in (images, padding))

        def forward() -> Any:
            # Autocast frees its cached casts of weights at the end of its block; a graph lives longer.
            dtype = autocast_dtype(images.device.type)
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
                return self.network(*inputs)

        try:
            self.recorder.order()
            self.graphs[key] = _Recorded(inputs, *self.recorder.record(forward))
        except RuntimeError as error:  # such as out of memory, or an operation that waits for the GPU
            self.failure = str(error).partition("\n")[0]
            self.clear()
            warnings.warn(f"inference runs without CUDA graphs: {self.failure}", RuntimeWarning, stacklevel=2)
            return None
        return self.graphs[key]

    def run(self, recorded: _Recorded, images: Tensor, padding: Tensor | None) -> Any:
        """Replay a graph for these inputs -> a copy of its result, which the next replay overwrites."""
        self.recorder.order()
        for static, x in zip(recorded.inputs, (images, padding), strict=True):
            if x is not None:
                static.copy_(x)
        recorded.replay()
        return tree_map_only(Tensor, torch.clone, recorded.result)


def _key_of(images: Tensor, padding: Tensor | None) -> tuple:
    """Key of a batch, from all that selects the kernels: batches with equal keys can share a graph."""
    return (
        *(x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in (images, padding)),
        autocast_dtype(images.device.type),
        requested(),
        float32_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
