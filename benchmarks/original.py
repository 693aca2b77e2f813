"""The original CUDA kernels of deformable attention (Deformable DETR), built from a checkout and called by ctypes.

The checkout is named by its folder: of Deformable DETR, of the official DINO or of detrex, which have the same
kernels. They are float32. Only a temporary copy is changed, where it asks for headers that PyTorch no longer has, or
that need a whole CUDA toolkit.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
FILE = "ms_deform_im2col_cuda.cuh"
FOREIGN = re.compile(r'^\s*#include\s*[<"](?:ATen|THC|c10|torch)/.*$', re.MULTILINE)


class Sizes(ctypes.Structure):
    """As in original.cu."""

    _fields_ = [(n, ctypes.c_int) for n in ("batch", "tokens", "heads", "channels", "levels", "queries", "points")]


def find(folder):
    """The file of the kernels in a checkout."""
    found = sorted(Path(folder).rglob(FILE))
    if not found:
        raise FileNotFoundError(f"{folder} is no checkout with the original kernels: there is no {FILE} in it")
    return found[0]


def find_nvcc():
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise FileNotFoundError("no nvcc: the original kernels can't be built")
    return nvcc


def compile_kernels(folder, architecture, target):
    """Make the shared library `target` for an architecture such as "90"."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / FILE
        copy.write_text(FOREIGN.sub("", find(folder).read_text()))
        command = [find_nvcc(), "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-shared", "-Xcompiler", "-fPIC"]
        command += ["-cudart", "static", f'-DORIGINAL_KERNELS="{copy}"', HERE / "original.cu", "-o", target]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise RuntimeError(f"the original kernels don't compile: {lines[0]}")
    return target


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


class Original:
    """The kernels, with the zero fills that the original program does.

    Args:
        library: the path of the shared library.
        shapes: (L, 2) height and width of the levels, int64, on the GPU.
        starts: (L,) the first token of each level, likewise.
    """

    def __init__(self, library, shapes, starts):
        self.library = ctypes.CDLL(str(library))
        self.shapes, self.starts = shapes, starts

    def call(self, name, sizes, *tensors):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(self.library, name)(stream, ctypes.byref(sizes), *map(pointer, tensors))
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    def sizes(self, value, weights):
        batch, tokens, heads, channels = value.shape
        return Sizes(batch, tokens, heads, channels, len(self.shapes), weights.shape[1], weights.shape[-1])

    def forward(self, value, locations, weights):
        """value (B, S, M, D), locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P), all float32 -> (B, Q, M*D)"""
        inputs = [self.checked(x) for x in (value, locations, weights)]
        output = value.new_zeros(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])
        self.call("original_forward", self.sizes(value, weights), *self.arguments(inputs), output)
        return output

    def backward(self, grad, value, locations, weights):
        """Gradients of value, locations and weights for the gradient (B, Q, M*D) of the output."""
        inputs = [self.checked(x) for x in (value, locations, weights)]
        gradients = [torch.zeros_like(x) for x in inputs]
        arguments = [self.checked(grad), *self.arguments(inputs), *gradients]
        self.call("original_backward", self.sizes(value, weights), *arguments)
        return gradients

    def arguments(self, inputs):
        value, *rest = inputs
        return value, self.shapes, self.starts, *rest

    def checked(self, x):
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"the original kernels take contiguous float32, not {x.dtype} of strides {x.stride()}")
        return x


def build(folder, device):
    """The library for a GPU, in a temporary folder that lasts as long as the process."""
    major, minor = torch.cuda.get_device_capability(device)
    target = Path(tempfile.mkdtemp(prefix="original")) / "original.so"
    return compile_kernels(folder, f"{major}{minor}", target)


def as_extension(folder, device):
    """What the module MultiScaleDeformableAttention of such a program offers, made from its own kernels."""
    library = build(folder, device)

    class Extension:
        @staticmethod
        def ms_deform_attn_forward(value, shapes, starts, locations, weights, step):
            return Original(library, shapes, starts).forward(value, locations, weights)

        @staticmethod
        def ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, step):
            return Original(library, shapes, starts).backward(grad, value, locations, weights)

    return Extension


if __name__ == "__main__":
    folder, architecture, target = sys.argv[1:]
    print(compile_kernels(folder, architecture, target))
