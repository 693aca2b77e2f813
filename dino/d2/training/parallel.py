"""Several processes: starting them, and a model that they share."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import launch as spawn
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing import ProcessExitedException

from dino.modeling.blocks import find_blocks
from dino.utils.files import Stopped, UserError

logger = logging.getLogger("detectron2.dino")


class Processes(NamedTuple):
    """Which processes to start.

    Args:
        num_gpus: processes on this machine, one for each GPU.
        num_machines: number of machines.
        machine_rank: number of this machine, from 0 on.
        dist_url: address of machine 0; a single machine takes a free port.
    """

    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"


def launch(main: Callable, processes: Processes, *args: Any) -> Any:
    """Run `main(*args)` in every process: this one, one of torchrun's, or `processes.num_gpus` new ones.

    Returns:
        the value of `main` if this process is the only one.

    Raises:
        UserError: the numbers of processes make no sense.
    """
    if "LOCAL_RANK" in os.environ:
        _join_group(processes)
        try:
            main(*args)
        finally:
            _leave_group()
        return None
    num_gpus, num_machines, machine_rank, url = processes
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {num_gpus}, but this machine has {torch.cuda.device_count()}")
    if num_machines == 1:
        url = "auto"  # Detectron2's default port follows from the user: a second run would meet the first one
    if num_gpus * num_machines == 1:
        return main(*args)
    code = multiprocessing.get_context("spawn").Value("i", 0)
    with _signals_passed_on() as received:
        try:
            spawn(_work_in_group, num_gpus, num_machines, machine_rank, url, args=(main, args, code))
        except ProcessExitedException as error:
            if received:  # by processes that could not yet, or no longer, stop with a checkpoint
                raise Stopped(128 + received[0]) from error
            raise UserError(f"the training ended: {error}. Is the memory of the machine full?") from error
    if code.value:
        raise Stopped(code.value)
    return None


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Within the block, pass SIGINT and SIGTERM on to the processes that this one has started -> the signals so far.

    Those that got the same signal from a terminal count both as one, see `StopSignal`.
    """
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        for process in multiprocessing.active_children():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work_in_group(main: Callable, args: tuple, code: Any) -> None:
    """What each process of Detectron2's launcher does; `code` receives the exit code of a stop by a signal."""
    try:
        main(*args)
    except Stopped as stop:
        code.value = stop.code
    except KeyboardInterrupt:
        code.value = 130
        raise
    _leave_group()


def _leave_group() -> None:
    """End the process group and its threads.

    `destroy_process_group` leaves gloo's threads running as long as anything refers to a group: Detectron2's global
    variables, or the device mesh of a sharded model. A thread that drops the last tensors of its collective needs
    Python's lock. If Python is ending by then, the thread ends the process by SIGABRT.
    """
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    for mesh in [x for x in gc.get_objects() if type(x) is DeviceMesh]:  # caches of DTensor keep meshes forever
        getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()  # the trainer, its hooks and the model refer to each other


def _join_group(processes: Processes) -> None:
    """Join the process group that torchrun describes in the environment."""
    if processes.num_gpus != 1 or processes.num_machines != 1:
        raise UserError("torchrun starts the processes: leave out --num-gpus and --num-machines")
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart the store still holds the addresses of the dead. (On several machines the counts can differ;
        # there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every attempt a store of its own, see docs/scaling.md.)
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def from_main(value):
    """Return the main process's value, which must be small, on all processes."""
    return comm.all_gather(value)[0]


@contextmanager
def entered_by_main(make: Callable[[], AbstractContextManager]) -> Iterator[Any]:
    """Enter the context `make()` on the main process alone; every process gets its value, or raises its UserError."""
    value = error = None
    with ExitStack() as stack:
        if comm.is_main_process():
            try:
                value = stack.enter_context(make())
            except UserError as problem:
                error = problem
        value, error = from_main((value, error))
        if error:
            raise error
        yield value


def wrap_ddp_or_fsdp(model: nn.Module, cfg: DictConfig) -> nn.Module:
    """Wrap a model for several processes: `train.parallel` is "ddp" (each holds all of it) or "fsdp" (each a shard)."""
    if cfg.train.parallel not in ("ddp", "fsdp"):
        raise UserError(f"train.parallel={cfg.train.parallel!r}: write ddp or fsdp")
    if comm.get_world_size() == 1:
        return model
    device = torch.device(cfg.train.device).type
    if cfg.train.parallel == "ddp":
        return create_ddp_model(model, **cfg.train.ddp, **({} if device == "cuda" else {"device_ids": None}))
    model.to(memory_format=torch.contiguous_format)  # FSDP2 can't shard channels-last weights
    mesh = init_device_mesh(device, (comm.get_world_size(),))
    with suppress(ValueError):  # a backbone without known blocks is sharded with the rest
        for block in find_blocks(model.network.neck.backbone).values():
            fully_shard(block, mesh=mesh)
    for layer in [*model.network.encoder.layers, *model.network.decoder.layers]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gather_shards(model: nn.Module) -> None:
    """Gather a sharded model on every process, and keep it whole: for evaluation, where batches are uneven."""
    for module in _sharded_modules(model):
        module.set_reshard_after_forward(False)
        module.unshard()


def drop_shards(model: nn.Module) -> None:
    """Shard the model again after `gather_shards`."""
    for module in _sharded_modules(model):
        module.set_reshard_after_forward(module is not model)  # fully_shard's own choice
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The sharded parts of a model; none without `train.parallel=fsdp`."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
