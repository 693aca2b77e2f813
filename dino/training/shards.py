"""Tensors and gradients of a model that several processes share; without them, all is as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only


def process_rank() -> int:
    """Number of this process; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradients_shared(model: nn.Module, now: bool) -> AbstractContextManager:
    """Within the block, backward passes average their gradients over the processes only if `now`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def local(x: Tensor) -> Tensor:
    """This process's shard of a tensor, with the same memory; the tensor itself if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, reference: Tensor) -> Tensor:
    """Shard the whole tensor `x`, equal on all processes, as `reference` is sharded."""
    if not isinstance(reference, DTensor) or x.shape != reference.shape:
        return x
    return distribute_tensor(x.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None)


def whole(state):
    """Gather all shards of a tensor or of a nested state; all processes must call it."""
    return tree_map_only(DTensor, lambda x: x.full_tensor(), state)
