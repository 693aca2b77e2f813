"""`dino env`: what a bug report needs, and which form of the attention operator runs where, and why."""

import importlib
import os
import platform

import torch

import dino
from dino.layers.ops import operator
from dino.layers.ops.build import read_record

PACKAGES = ("torchvision", "detectron2", "scipy", "numpy")


def report() -> list[str]:
    """The lines that `python -m dino.utils.environment` prints."""
    lines = [
        f"dino {dino.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda}), {', '.join(map(_version, PACKAGES))}",
        f"CPU: {torch.get_num_threads()} threads, vectors {torch.backends.cpu.get_cpu_capability()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}")
    if not torch.cuda.is_available():
        lines.append("GPU: none that this torch can use")
    return lines + operator_lines()


def operator_lines() -> list[str]:
    """The choice, then for every kind of device what was built, what runs and why."""
    choice = operator.requested()
    lines = [f"deform_attn: {operator.VARIABLE}={choice}"]
    for part, file in operator.FILES.items():
        lines.append(f"  {part} build: {_build(part, operator.FOLDER / file)}")
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in map(torch.device, names):
        lines.append(f"  {device} runs {_runs(choice, device)}")
    return lines


def _build(part: str, file: os.PathLike) -> str:
    if not os.path.exists(file):
        return f"none; {operator.HINT}"
    record = read_record(part, operator.FOLDER)
    if record is None:
        return "made elsewhere, without a record"
    return f"for {', '.join(record['architectures'])}; {record['compiler']}; against torch {record['torch']}"


def _runs(choice: str, device: torch.device) -> str:
    if choice == "reference":
        return "plain PyTorch: so chosen"
    verdict = operator.verdict(device)
    if not verdict.usable:
        return f"{'an error' if choice == 'compiled' else 'plain PyTorch'}: {verdict.reason}"
    kernels = f" ({operator.cpu_kernels()} kernels)" if device.type == "cpu" else ""
    return f"the compiled operator{kernels}: {verdict.reason}"


def _version(package: str) -> str:
    try:
        return f"{package} {getattr(importlib.import_module(package), '__version__', '')}".rstrip()
    except ImportError:
        return f"{package} absent"


if __name__ == "__main__":
    print("\n".join(report()))
