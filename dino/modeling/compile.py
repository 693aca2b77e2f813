"""`torch.compile` for the parts of a network, in training and in inference."""

from __future__ import annotations

from typing import Any

from .dino import DINO

PARTS = ("neck", "position_encoding", "encoder", "query_selection", "decoder")
_MOST_GRAPHS = 64  # of one function; PyTorch's limit of 8 is too low for training, inference and levels of one cell

# Without it, PyTorch 2.12 and later compile a graph for every image size if a convolution has a gradient.
_NECK_OPTIONS = {"force_layout_optimization": True}


def compile_network(network: DINO, **options: Any) -> DINO:
    """Let PyTorch compile the parts of `network` when they first run, in place.

    Denoising is not compiled: its shapes follow the number of objects. The deformable attention operator is one call in
    the compiled code. Image size, batch size and number of queries are dynamic: one graph of a part serves all images.
    Training, inference, a batch of one, and levels of one cell have their own graphs. Parameters keep their names;
    copies of the network are not compiled.

    Args:
        network: in its final dtype and on its final device. Compile it before it is wrapped for several processes.
        options: of `torch.compile`; the default is `dynamic=True`.

    Returns:
        `network` itself.
    """
    import torch._dynamo  # here, because it takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    options = {"dynamic": True, **options}
    tuned = options.keys() & {"backend", "mode", "options"}
    for part in PARTS:
        more = {"options": _NECK_OPTIONS} if part == "neck" and not tuned else {}
        getattr(network, part).compile(**options, **more)
    return network
