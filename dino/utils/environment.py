"""What a bug report says about the machine: Python, libraries, CPU and GPUs."""

import importlib
import platform

import torch

_PACKAGES = ("torchvision", "detectron2", "scipy", "numpy")


def environment_lines() -> list[str]:
    """The versions of Python and of the libraries, the CPU, and each GPU; one line of text each."""
    lines = [
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda}), {', '.join(map(_version, _PACKAGES))}",
        f"CPU: {torch.get_num_threads()} threads, vectors {torch.backends.cpu.get_cpu_capability()}",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}")
    if not torch.cuda.is_available():
        lines.append("GPU: none that this torch can use")
    return lines


def _version(package: str) -> str:
    try:
        return f"{package} {getattr(importlib.import_module(package), '__version__', '')}".rstrip()
    except ImportError:
        return f"{package} absent"
