"""Run by `accelerate launch`: gradients of this process's share of four pictures, written to a folder."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from .tiny_model import Samples, tiny_model, to_batch

UNEVEN, ONE_EMPTY = (3, 0, 1, 1), (3, 2, 0, 0)  # objects of four pictures, two on each process


def gradients(accelerator, counts, parts=1, **fields):
    """{parameter: gradient} after one step of `parts` batches, in each of which all processes take part."""
    model = tiny_model(**fields).train()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    samples = Samples(*counts)
    share = len(samples) // parts // accelerator.num_processes
    for part in range(parts):
        first = share * (part * accelerator.num_processes + accelerator.process_index)
        batch = to_batch([samples[n] for n in range(first, first + share)])
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
    return {name: p.grad for name, p in accelerator.unwrap_model(model).named_parameters() if p.grad is not None}


def main(folder):
    """One process of any number."""
    torch.set_num_threads(1)
    plain = Accelerator(cpu=True)
    results = {
        "uneven": gradients(plain, UNEVEN, num_denoising=0),
        "one empty": gradients(plain, ONE_EMPTY, num_denoising=0),
        "denoising": gradients(plain, ONE_EMPTY),
        "none": gradients(plain, (0, 0, 0, 0)),
    }
    results["accumulated"] = gradients(
        Accelerator(cpu=True, gradient_accumulation_steps=2), UNEVEN, parts=2, num_denoising=0
    )
    torch.save(results, Path(folder, f"gradients_{plain.num_processes}_{plain.process_index}.pth"))


if __name__ == "__main__":
    main(*sys.argv[1:])
