"""`torch.compile` for the parts of a network, in training and in inference."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .dino import DINO

PARTS = ("neck", "position_encoding", "encoder", "query_selection", "decoder")
_turn = threading.RLock()  # of the thread that runs compiled code
_MOST_GRAPHS = 64  # of one function; PyTorch's limit of 8 is too low for training, inference and levels of one cell

# Without it, PyTorch 2.12 and later compile a graph for every image size if a convolution has a gradient.
_NECK_OPTIONS = {"force_layout_optimization": True}


class _InTurns:
    """Calls a compiled part; of all threads, one runs compiled parts at a time.

    While a thread compiles, PyTorch's check whether code fits its inputs fails in others: they would compile the same
    again, up to the limit of graphs, and then run uncompiled.
    """

    def __init__(self, call: Callable):
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the part returns."""
        with nullcontext() if torch.compiler.is_dynamo_compiling() else _turn:
            return self.call(*args, **kwargs)


def compile_network(network: DINO, **options: Any) -> DINO:
    """Let PyTorch compile the parts of `network` when they first run, in place.

    Denoising is not compiled: its shapes follow the number of objects. The deformable attention operator is one call in
    the compiled code. Image size, batch size and number of queries are dynamic: one graph of a part serves all images.
    Training, inference, a batch of one, and levels of one cell have their own graphs. Parameters keep their names;
    copies of the network are not compiled. Several threads can run the network; they take turns in compiled parts.

    Args:
        network: in its final dtype and on its final device. Compile it before it is wrapped for several processes.
        options: of `torch.compile`; the default is `dynamic=True`.

    Returns:
        `network` itself.
    """
    importlib.import_module("torch._dynamo")  # here, because it takes seconds

    limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    torch._dynamo.config.recompile_limit = limit
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # there, the setting is that of one thread
        options = {"recompile_limit": limit, **options}
    options = {"dynamic": True, **options}
    tuned = options.keys() & {"backend", "mode", "options"}
    for name in PARTS:
        more = {"options": _NECK_OPTIONS} if name == "neck" and not tuned else {}
        part = getattr(network, name)
        part.compile(**options, **more)
        part._compiled_call_impl = _InTurns(part._compiled_call_impl)
    return network
