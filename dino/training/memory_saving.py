"""Less memory: activation checkpointing, and the settings to try where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from dino.modeling.blocks import find_blocks
from dino.utils.files import DataError


class OutOfMemory(RuntimeError):
    """A step needs more memory than there is."""


def checkpoint_activations(model: nn.Module, parts: Sequence[str]) -> None:
    """Recompute the activations of the blocks of `parts` in the backward pass instead of keeping them.

    Gradients stay the same. (BatchNorm in training mode counts each batch twice in its running statistics.)

    Args:
        model: a `Detector`, changed in place; parameters keep their names. Without `parts`, any model.
        parts: any of "backbone", "encoder", "decoder".

    Raises:
        DataError: a part has another name.
    """
    if not parts:
        return
    network = model.network
    known = {
        "backbone": lambda: find_blocks(network.neck.backbone).values(),
        "encoder": lambda: network.encoder.layers,
        "decoder": lambda: network.decoder.layers,
    }
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise DataError(f"train.activation_checkpointing: {unknown} is unknown, choose from {list(known)}")
    chosen = {block for part in parts for block in known[part]()}
    if chosen:
        wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=chosen.__contains__)


@contextmanager
def advice() -> Iterator[None]:
    """Context where running out of memory raises an `OutOfMemory` that names the settings to try."""
    try:
        yield
    except RuntimeError as error:  # the base class of torch.OutOfMemoryError; what the CPU's allocator raises
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"out of memory ({str(error).splitlines()[0]}). Try, alone or together: train.amp.enabled=True; "
            "train.activation_checkpointing=[backbone,encoder,decoder]; train.grad_accum_steps=2, which divides the "
            "batch and leaves the result as it is"
        ) from error
