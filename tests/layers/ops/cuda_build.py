"""Builds of the CUDA operator that tests look into: machine code for an architecture, or a stand-in for the CPU.

`python -m tests.layers.ops.cuda_build` prints what docs/performance_cuda.md says about the machine code.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parents[3] / "dino/layers/ops/csrc"
STAND_IN = Path(__file__).parent / "cuda_on_cpu"
TORCH = Path(torch.__file__).parent
ARCHITECTURES = ["75", "80", "90", "100", "120"]
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{TORCH}/include"]
FAST = re.compile(r"(forward|backward|sum_lists)_packets|backward_tiles")


def tool(name):
    """A program of the CUDA toolkit, or the copy of it that triton brings along; None if there is neither."""
    found = shutil.which(name)
    if found is None:
        copies = [Path(folder) / "triton/backends/nvidia/bin" / name for folder in sys.path]
        found = next((str(path) for path in copies if path.exists()), None)
    return found


@cache
def toolkit_headers():
    """The folder of the toolkit's headers as nvcc tells it, for nvcc may be a wrapper that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    folders = re.findall(r'-I"?([^"\s]+)', text)
    found = [Path(folder) for folder in folders if (Path(folder) / "vector_types.h").exists()]
    return found[0] if found else None


def run(command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return result.stdout


def sources_of(widths, folder):
    """A copy of the operator with fast kernels for some head widths only, which compiles in a fraction of the time."""
    for path in SOURCES.glob("*.[ch]*"):
        shutil.copy(path, folder)
    source = Path(folder) / "deform_attn_cuda.cu"
    choice = re.compile(r" +if \(dim == (\d+)\) return function\(.*\n")
    text = source.read_text()
    assert set(map(int, choice.findall(text))) >= set(widths), "the source chooses kernels in another way: change this"
    source.write_text(choice.sub(lambda found: found[0] if int(found[1]) in widths else "", text))
    return source


def compile_cuda(architecture, folder, widths=None):
    """The object file with machine code for one architecture, such as "90"; for all head widths or some."""
    target = Path(folder) / f"deform_attn_{architecture}.o"
    source = SOURCES / "deform_attn_cuda.cu" if widths is None else sources_of(widths, folder)
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", *FLAGS, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-gencode", code]
    run([*command, "-c", source, "-o", target])
    return target


def replace(text, old, new):
    assert text.count(old) == 1, f"the source has no single {old!r}: change this stand-in with it"
    return text.replace(old, new)


def stand_in_source(folder, mutants=()):
    """The operator with launches turned into calls, under the name dino_on_cpu, so that it can stand beside `dino`.

    Each of the mutants can be switched on in it, see mutants.py.
    """
    texts = {path.name: plant(path.name, path.read_text(), mutants) for path in SOURCES.glob("*.cu*")}
    for name in (name for name in texts if name.endswith(".cuh")):
        text = texts[name].replace(
            "extern __shared__ float4 kept_by_slots[];", "float4* const kept_by_slots = cuda_on_cpu::dynamic_shared;"
        )
        text = text.replace(
            "extern __shared__ float4 tile_samples[];", "float4* const tile_samples = cuda_on_cpu::dynamic_shared;"
        )
        text = text.replace("kManyCells = 1 << 16;", "kManyCells = 100;")  # small cases, several cells a warp
        (folder / name).write_text("#include <cuda_runtime.h>\n" + text)
    shutil.copy(SOURCES / "deform_attn.h", folder)
    text = texts["deform_attn_cuda.cu"]
    launch = "kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);"
    text = replace(text, launch, "cuda_on_cpu::run(blocks, threads, shared, [&] { kernel(arguments...); });")
    text = replace(text, "STD_CUDA_KERNEL_LAUNCH_CHECK();", "")
    limit = "cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)"
    text = replace(text, limit, "(bytes = cuda_on_cpu::most_shared, 0)")
    request = "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)"
    text = replace(text, request, "(bytes > cuda_on_cpu::most_shared)")
    text = replace(text, "aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream)", "0")
    text = re.sub(r"  const torch::stable::accelerator::DeviceGuard .*\n", "", text)
    text = replace(text, "kEntriesAtATime = int64_t{1} << 22;", "kEntriesAtATime = 5000;")  # small cases, several parts
    operators = re.findall(r'm\.impl\("(\w+)"', text)
    text = replace(text, "STABLE_TORCH_LIBRARY_IMPL(dino, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(dino_on_cpu, CPU, m)")
    schemas = "".join(f'  m.def("{schema(name)}");\n' for name in operators)
    source = folder / "deform_attn.cpp"
    source.write_text(f"{text}\nSTABLE_TORCH_LIBRARY(dino_on_cpu, m) {{\n{schemas}}}\n")
    return source


class Mutant(NamedTuple):
    """A fault to plant: `old`, which stands once in `context`, which stands once in `file`, becomes `new`.

    Statements end with a semicolon; everything else is an expression.
    """

    file: str
    context: str
    old: str
    new: str
    catcher: str | None  # part of the names of the tests that notice
    self_test: bool = True  # whether the self-test notices

    def switched(self, text, number):
        """`text` with a switch that puts `new` in place of it."""
        if self.old.endswith(";"):
            return f"if (cuda_on_cpu::planted == {number}) {{ {self.new} }} else {{ {text} }}"
        return f"(cuda_on_cpu::planted == {number} ? ({self.new}) : ({text}))"

    def place(self, text):
        """Where `old` begins in the file's text; None where the text has changed and there is no single such place."""
        if text.count(self.context) != 1 or self.context.count(self.old) != 1:
            return None
        return text.index(self.context) + self.context.index(self.old)


def lost(mutants):
    """Those whose place is no longer in the sources."""
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.cu*")}
    return [mutant for mutant in mutants if mutant.place(texts[mutant.file]) is None]


def plant(name, text, mutants):
    """The text of a source file with a switch for each of the mutants, which are numbered from 1; lost ones are not."""
    places = {}
    for number, mutant in enumerate(mutants, 1):
        if mutant.file == name and mutant.place(text) is not None:
            places.setdefault((mutant.place(text), len(mutant.old)), []).append((number, mutant))
    for start, length in sorted(places, reverse=True):  # from the end, so that places before stay where they are
        part = text[start : start + length]
        for number, mutant in places[start, length]:
            part = mutant.switched(part, number)
        text = text[:start] + part + text[start + length :]
    return text


def schema(name):
    inputs = ["Tensor value", "int[] shapes", "Tensor places", "Tensor weights"]
    if "fused" in name:
        inputs.append("Tensor reference")
    results = 1
    if "backward" in name:
        results = len(inputs) - 1
        inputs.insert(0, "Tensor grad")
    if "fused_backward" in name:
        inputs.append("bool by_reference=True")
    return f"{name}({', '.join(inputs)}) -> ({', '.join(['Tensor'] * results)})"


def build_stand_in(folder, mutants=()):
    """A library that registers the CUDA operators as torch.ops.dino_on_cpu, watched for races."""
    folder = Path(folder)
    target = folder / "dino_on_cpu.so"
    command = [
        "g++",
        "-O1",
        *FLAGS[1:],
        "-w",
        "-fPIC",
        "-fno-gnu-unique",
        f"-I{STAND_IN}",
        "-isystem",
        toolkit_headers(),
    ]
    run([*command, "-fsanitize=thread", "-c", stand_in_source(folder, mutants), "-o", folder / "kernels.o"])
    run([*command, "-O2", "-c", STAND_IN / "runtime.cpp", "-o", folder / "runtime.o"])
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    run(["g++", "-shared", "-Wl,-Bsymbolic", folder / "kernels.o", folder / "runtime.o", "-o", target, *libraries])
    return target


class Kernel(NamedTuple):
    """What the machine code of a kernel needs."""

    name: str
    registers: int
    stack: int  # bytes: spilled registers, and arrays that registers can't hold
    shared: int  # bytes, without what is asked for at launch
    code: list[str]  # one instruction a line, without gaps

    def count(self, pattern):
        return sum(bool(re.search(pattern, line)) for line in self.code)

    def inner_loops(self):
        """The code of each loop that has no loop inside."""
        jumps = [re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line) for line in self.code]
        targets = [(int(jump[1], 16) // 16, i) for i, jump in enumerate(jumps) if jump]  # an instruction has 16 bytes
        loops = [(first, last) for first, last in targets if first < last]
        inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return [self.code[first : last + 1] for first, last in inner]


def readable(names):
    return run([shutil.which("c++filt") or "cat", *names]).splitlines() if shutil.which("c++filt") else names


def kernels(file):
    """All kernels in an object file, by their readable name."""
    usage = run([tool("cuobjdump"), "-res-usage", file])
    needs = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    codes = dict(re.findall(r"Function : (\S+)\n(.*?)\n\s*\.{10,}", run([tool("cuobjdump"), "-sass", file]), re.S))
    result = {}
    for (symbol, *numbers), name in zip(needs, readable([need[0] for need in needs]), strict=True):
        short = re.sub(r"^void |dino::|\(.*", "", name)
        code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", codes[symbol])
        result[short] = Kernel(short, *map(int, numbers), code)
    return result


def print_table(found):
    """Markdown, from {architecture: kernels}: a line for each fast kernel."""
    titles = ["kernel", *(f"registers, {number}" for number in found), "shared memory", "stack", "16-byte loads"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in sorted(filter(FAST.search, next(iter(found.values())))):
        same = [kernels[name] for kernels in found.values()]
        loads = [kernel.count(r"LDG.*\.128") for kernel in same]
        figures = [*(kernel.registers for kernel in same), same[0].shared, max(kernel.stack for kernel in same)]
        print(f"| `{name}` | {' | '.join(map(str, figures))} | {min(loads)} to {max(loads)} |")


def main():
    """Compile head width 32 for the architectures named, by default all, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        print_table({number: kernels(compile_cuda(number, folder, [32])) for number in sys.argv[1:] or ARCHITECTURES})


if __name__ == "__main__":
    main()
