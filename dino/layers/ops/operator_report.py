"""What `dino env` and the log of a training say about the attention operator."""

import os

import torch

from . import operator
from .build import read_record


def operator_lines() -> list[str]:
    """The choice, each build, and for each device which form runs and why; one line of text each."""
    choice = operator.requested()
    lines = [f"deform_attn: {operator.VARIABLE}={choice}"]
    for part, file in operator.FILES.items():
        lines.append(f"  {part} build: {_build(part, operator.FOLDER / file)}")
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in map(torch.device, names):
        lines.append(f"  {device} runs {_runs(choice, device)}")
    return lines


def operator_form(device: torch.device) -> str:
    """Which form of the operator runs on a device; why, if it is not the compiled one."""
    form = _runs(operator.requested(), device)
    return form.partition(":")[0] if form.startswith("the compiled") else form


def _build(part: str, file: os.PathLike) -> str:
    if not os.path.exists(file):
        return f"none; {operator.HINT}"
    record = read_record(part, operator.FOLDER)
    if record is None:
        return "made elsewhere, without a record"
    return f"for {', '.join(record['architectures'])}; {record['compiler']}; against torch {record['torch']}"


def _runs(choice: str, device: torch.device) -> str:
    if choice in operator.PLAIN:
        return "plain PyTorch: so chosen"
    verdict = operator.verdict(device)
    if not verdict.usable:
        return f"{'an error' if choice == 'compiled' else 'plain PyTorch'}: {verdict.reason}"
    kernels = f" ({operator.cpu_kernels()} kernels)" if device.type == "cpu" else ""
    return f"the compiled operator{kernels}: {verdict.reason}"
