"""Run by torchrun: losses and gradients of this process's half of a batch, written to the folder given."""

import sys
from pathlib import Path

import torch
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm

from dino.d2.training.memory_saving import counted_together
from dino.d2.training.parallel import Processes, gradients_shared, launch, unwrapped
from dino.layers.denoising import Noise

from .tiny import random_input, tiny_detector

COUNTS = (3, 1, 3, 2)  # objects of four images of one size; the fullest of either half has three
GROUPS = 2


def batch():
    torch.manual_seed(5)
    return [random_input(f"{n}.png", count) for n, count in enumerate(COUNTS)]


def give_noise(model, first, count):
    """The draws of `count` objects from the `first` on, out of those of the whole batch; always the same groups."""
    torch.manual_seed(6)
    total, repeats = sum(COUNTS), 2 * GROUPS
    draws = (torch.rand(repeats, total), torch.randint(3, (repeats, total)), torch.randint(2, (repeats, total, 4)))
    noise = Noise(*(x[:, first : first + count] for x in (*draws, torch.rand(repeats, total, 4))))
    model.network.denoising.num_groups = lambda _: GROUPS
    model.network.denoising.draw = lambda *_: noise


def step(num_denoising, parts, *, rank=0, world=1):
    """Losses, averaged over the processes, and shared gradients of a batch that comes in `parts` on each process."""
    torch.manual_seed(7)
    model = tiny_detector(num_denoising=num_denoising)
    model.train()
    share = len(COUNTS) // (world * parts)
    shared = create_ddp_model(model, device_ids=None, find_unused_parameters=False) if world > 1 else model
    places = [rank * parts * share + n * share for n in range(parts)]
    batches = [batch()[place : place + share] for place in places]
    totals = {}
    with counted_together(unwrapped(shared), batches):
        for number, (place, part) in enumerate(zip(places, batches, strict=True), 1):
            give_noise(model, sum(COUNTS[:place]), sum(COUNTS[place : place + share]))
            with gradients_shared(shared, number == parts):
                losses = shared(part)
                sum(losses.values()).backward()
            totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
    for loss in totals.values() if world > 1 else ():
        torch.distributed.all_reduce(loss)
    return {
        "losses": {name: loss / world for name, loss in totals.items()},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


def main(folder):
    """One of two processes."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    results = {key: step(*key, rank=rank, world=2) for key in ((0, 1), (8, 1), (0, 2))}
    if rank == 0:
        torch.save(results, Path(folder, "results.pth"))


if __name__ == "__main__":
    launch(main, Processes(), sys.argv[1])
