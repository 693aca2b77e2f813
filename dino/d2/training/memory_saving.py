"""Less memory: activations computed twice, large batches in parts, and what to try when it ran out all the same."""

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

from dino.layers.criterion import average_over_workers
from dino.modeling.blocks import find_blocks
from dino.utils.files import DataError


class OutOfMemory(RuntimeError):
    """A step needs more memory than there is."""


def checkpoint_activations(model: nn.Module, parts: Sequence[str]) -> None:
    """Compute the activations inside the blocks of `parts` again in the backward pass instead of keeping them.

    Gradients stay the same. (BatchNorm in training mode counts each batch twice in its running statistics.)

    Args:
        model: a `DINODetector`, changed in place; the names of its parameters stay. Without `parts`, any model.
        parts: any of "backbone", "encoder", "decoder".
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
def counted_together(model: nn.Module, parts: list[list[dict]]) -> Iterator[None]:
    """Within, the losses of every part are divided by the number of objects of all parts together.

    So their sum is the loss of the undivided batch.

    Args:
        model: a `DINODetector`.
        parts: the batches of one step.
    """
    if len(parts) == 1:
        yield
        return
    criterion, budget = model.criterion, model.network.denoising.num_denoising
    counts = [len(x["instances"]) for part in parts for x in part]
    averaged: list[torch.Tensor] = []

    def average(_, device: torch.device) -> torch.Tensor:
        if not averaged:
            noised = sum(min(count, budget) for count in counts)
            averaged.append(average_over_workers([sum(counts), noised], device))
        return averaged[0]

    criterion.average = average
    try:
        yield
    finally:
        criterion.average = average_over_workers


@contextmanager
def advice() -> Iterator[None]:
    """Within, running out of memory raises an `OutOfMemory` that names the settings to try."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator knows no better
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"out of memory ({str(error).splitlines()[0]}). Try, alone or together: train.amp.enabled=True; "
            "train.activation_checkpointing=[backbone,encoder,decoder]; train.grad_accum_steps=2, which divides the "
            "batch and leaves the result as it is"
        ) from error
