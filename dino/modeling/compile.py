"""`torch.compile` for the parts of a network, in training and in inference."""

from __future__ import annotations

from typing import Any

from .dino import DINO

PARTS = ("neck", "position_encoding", "encoder", "query_selection", "decoder")
MOST_GRAPHS = 64  # of one function; PyTorch's 8 are soon used up by training, inference and levels of one cell

# Without it, PyTorch 2.12 and later fix the sizes of maps where a convolution has a gradient: a graph for every size.
NECK_OPTIONS = {"force_layout_optimization": True}


def compile_network(network: DINO, **options: Any) -> DINO:
    """Let PyTorch compile the parts of `network` when they first run, in place.

    Denoising stays as it is: it follows the number of objects. The deformable attention operator is one call in the
    compiled code. Sizes, batch and number of queries stay open, so that one graph of a part serves all images. Training
    and inference, a batch of one, and levels of one cell have graphs of their own. Parameters keep their names, and
    copies of the network are not compiled.

    Args:
        network: in its final type and place. Compile it before it is wrapped for several processes.
        options: of `torch.compile`, beside or in place of `dynamic=True`.

    Returns:
        `network` itself.
    """
    import torch._dynamo  # here, because it takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    options = {"dynamic": True, **options}
    tuned = options.keys() & {"backend", "mode", "options"}
    for part in PARTS:
        more = {"options": NECK_OPTIONS} if part == "neck" and not tuned else {}
        getattr(network, part).compile(**options, **more)
    return network
