"""Run by torchrun with a folder and recipes: steps of this process's half of a batch, written to the folder."""

import sys
from pathlib import Path

import torch
from detectron2.utils import comm

from dino.d2.training.parallel import Processes, launch

from .in_parts import in_float64, skip_a_step, step

EVEN, UNEVEN, ONE_EMPTY = (3, 1, 3, 2), (3, 0, 1, 0), (2, 1, 0, 0)  # objects of four images, two on each process
BASE = "configs/dino_r50_4scale_12ep.py"


def steps(recipe):
    """(what was done) -> losses and gradients of the whole batch."""
    options = {"own_denoising": False, "change": in_float64}
    return {
        (recipe, "whole"): step(recipe, EVEN, (2,), change=in_float64),
        (recipe, "parts"): step(recipe, UNEVEN, (1, 2), **options),
        (recipe, "wrapped"): step(recipe, ONE_EMPTY, (1, 2), wrapper="own", **options),
    }


def main(folder, *recipes):
    """One of two processes."""
    torch.set_num_threads(1)
    folder = Path(folder)
    results, skipped = {}, {}
    for recipe in recipes:
        results |= steps(recipe)
        for wrapper, parts in (("plain", 1), ("own", 2)):
            skipped[recipe, wrapper] = skip_a_step(recipe, wrapper, folder, parts=parts)
    results["fsdp"] = step(BASE, UNEVEN, (1, 2), own_denoising=False, parallel="fsdp")
    skipped["fsdp"] = skip_a_step(BASE, "own", folder, parts=2, parallel="fsdp")
    torch.save({"results": results, "skipped": skipped}, folder / f"results_{comm.get_rank()}.pth")


if __name__ == "__main__":
    launch(main, Processes(), *sys.argv[1:])
