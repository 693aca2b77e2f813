"""`torch.compile` for the parts of a network, in training and in inference."""

from __future__ import annotations

from typing import Any

import torch

from .network import DINO

PARTS = ("neck", "position_encoding", "encoder", "query_selection", "decoder")
MOST_GRAPHS = 64  # of one function; PyTorch's 8 are soon used up by training, inference and levels of one cell


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
    import torch._dynamo  # it takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for part in PARTS:
        getattr(network, part).compile(**{"dynamic": True, **options})
    return network
