"""CUDA graphs: inference of one size of images, recorded once, then started by a single call of the host.

At a batch of one a GPU waits for the host, which starts more than 500 kernels for each image; a replayed graph has them
all in its queue.
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
REMEMBERED = 1000  # sizes that were seen but not recorded


class Recorder(Protocol):
    """Records what a function starts on a GPU."""

    def ready(self, images: Tensor) -> bool:
        """Whether a graph of work on `images` can be recorded or replayed now."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run `function` -> (replay, result). Calling `replay` does its work again and writes into the same result."""

    def order(self) -> None:
        """Let work that follows on the current stream wait for the last replay, on whatever stream that was."""


class CudaRecorder:
    """A `Recorder` by `torch.cuda.CUDAGraph`. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self):
        self.pool = None
        self.stream: torch.cuda.Stream | None = None  # of the recording
        self.last: torch.cuda.Stream | None = None  # of the last replay

    def ready(self, images: Tensor) -> bool:
        """Images on a GPU, whose stream no other graph is recording."""
        return images.is_cuda and not torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """As of `Recorder`. Runs `function` once before, on the same stream, where libraries then set themselves up."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to allocate and to copy, as those of a loader do.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result

    def order(self) -> None:
        """As of `Recorder`."""
        stream = torch.cuda.current_stream()
        if self.last is not None and self.last != stream:
            stream.wait_stream(self.last)
        self.last = stream


class Recorded(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    inputs: tuple[Tensor, Tensor | None]
    replay: Callable[[], None]
    result: Any


class Places:
    """Where the parameters and buffers of a network lie, and which modules it has: what a graph has built in.

    It is looked at before every replay, hence without loops in Python.
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self.tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules) if t]
        self.hooks = [t for m in modules for t in (m._forward_hooks, m._forward_pre_hooks)]
        self.members = list(self.list_members())  # held, so that no other object gets the id of one
        self.ids = list(map(id, self.members))
        self.tensors = [x for x in self.members if isinstance(x, Tensor)]
        self.pointers = list(map(Tensor.data_ptr, self.tensors))

    def list_members(self) -> Iterator[Any]:
        """Parameters, buffers and modules, as they are now."""
        return chain.from_iterable(map(dict.values, self.tables))

    def unchanged(self) -> bool:
        """Whether everything lies where it was; values may be others."""
        same = list(map(id, self.list_members())) == self.ids
        return same and list(map(Tensor.data_ptr, self.tensors)) == self.pointers

    def hooked(self) -> bool:
        """Whether a module has hooks, which a replayed graph would not call."""
        return any(self.hooks)


class CudaGraphs:
    """Runs the inference of a network, by CUDA graphs where a size comes again.

    The first batch of a size runs as ever; the second one is recorded, and it and all later ones are replayed. Results
    are the network's, in new tensors. The network runs as ever in training, on a CPU, where gradients are wanted, where
    modules have hooks, and while another graph is being recorded. New values of parameters are seen; parameters in
    another place, as after `network.to`, drop all graphs. Calls of several threads wait for each other.

    Args:
        network: of (images, padding), such as `DINO`; padding may be None.
        most: graphs that are kept; the one that was not used for longest is dropped. All share the memory of the
            largest forward pass, and keep it; each has its own inputs and results.
        recorder: records them.

    Raises:
        ValueError: `most` is less than 1.
    """

    def __init__(self, network: nn.Module, *, most: int = MOST, recorder: Recorder | None = None):
        if most < 1:
            raise ValueError(f"at least one graph must be kept, not {most}")
        self.network = network
        self.most = most
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.lock = threading.Lock()
        self.places: Places | None = None
        self.seen: OrderedDict[tuple, None] = OrderedDict()
        self.graphs: OrderedDict[tuple, Recorded] = OrderedDict()
        self.failure = ""  # why nothing is recorded any more

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and those in other processes, record graphs of their own."""
        return {"network": self.network, "most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without graphs."""
        self.__init__(**state)

    def __call__(self, images: Tensor, padding: Tensor | None) -> Any:
        """What `network(images, padding)` returns."""
        if not self.usable(images):
            return self.network(images, padding)
        with self.lock, torch.cuda.device_of(images):
            self.look_for_changes()
            if not self.places.hooked():
                recorded = self.find(images, padding)
                if recorded:
                    return self.run(recorded, images, padding)
        return self.network(images, padding)

    def usable(self, images: Tensor) -> bool:
        """Whether this call can be one of a graph."""
        return (
            not self.failure
            and not self.network.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and self.recorder.ready(images)
        )

    def look_for_changes(self) -> None:
        """Drop the graphs where they would read what is no more the network's."""
        if self.places is None or not self.places.unchanged():
            self.clear()
            self.places = Places(self.network)

    def clear(self) -> None:
        """Forget all graphs, and give their memory back."""
        self.graphs.clear()
        self.seen.clear()
        self.places = None

    def find(self, images: Tensor, padding: Tensor | None) -> Recorded | None:
        """The graph for a batch like this, which is recorded if one has been here before; else None."""
        key = key_of(images, padding)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        if key not in self.seen:
            self.seen[key] = None
            if len(self.seen) > REMEMBERED:
                self.seen.popitem(last=False)
            return None
        while len(self.graphs) >= self.most:
            self.graphs.popitem(last=False)
        return self.record(key, images, padding)

    def record(self, key: tuple, images: Tensor, padding: Tensor | None) -> Recorded | None:
        """A new graph. Where that fails, a warning says why, and the network runs as ever from then on."""
        with torch.inference_mode(False):  # tensors made in it could not be written to outside
            inputs = tuple(x if x is None else torch.empty_like(x).copy_(x) for x in (images, padding))

        def forward() -> Any:
            # Weights that autocast has cast and kept belong to the block of code around, a graph outlives them.
            dtype = autocast_dtype(images.device.type)
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
                return self.network(*inputs)

        try:
            self.recorder.order()
            self.graphs[key] = Recorded(inputs, *self.recorder.record(forward))
        except RuntimeError as error:  # out of memory is one; an operation that waits for the GPU is another
            self.failure = str(error).partition("\n")[0]
            self.clear()
            warnings.warn(f"inference runs without CUDA graphs: {self.failure}", RuntimeWarning, stacklevel=2)
            return None
        return self.graphs[key]

    def run(self, recorded: Recorded, images: Tensor, padding: Tensor | None) -> Any:
        """The result of a graph for these inputs, copied: the next replay writes over the graph's own."""
        self.recorder.order()
        for static, x in zip(recorded.inputs, (images, padding), strict=True):
            if x is not None:
                static.copy_(x)
        recorded.replay()
        return tree_map_only(Tensor, torch.clone, recorded.result)


def key_of(images: Tensor, padding: Tensor | None) -> tuple:
    """All that decides which kernels run: batches with the same key can share a graph."""
    return (
        *(x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in (images, padding)),
        autocast_dtype(images.device.type),
        requested(),
        float32_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
