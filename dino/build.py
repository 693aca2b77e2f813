"""`python -m dino.build`: compile the deformable attention operator into the installed package.

Needs torch >= 2.10 and a C++17 compiler (the variable CXX, else c++, g++ or clang++), a few seconds, and write access
to the package. Where nvcc is found (in CUDA_HOME, on the PATH, in /usr/local/cuda), the part for CUDA is built as well
if there is a GPU or FORCE_CUDA=1: for TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX", else for the GPUs that are there,
else for all from 7.5 on. What is up to date stays. Without any of this the package works, as plain PyTorch.

setup.py runs this file before the package exists, so it imports nothing but the standard library.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "layers"
SOURCES = FOLDER / "csrc"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # LibTorch's stable ABI as of 2.10
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", TORCH_TARGET]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VECTORS = {"generic": [], "avx2": AVX2, "avx512": AVX512}
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-DUSE_CUDA", TORCH_TARGET]
CUDA_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


class Result(NamedTuple):
    """What became of one part, "cpu" or "cuda"."""

    part: str
    state: str  # built, up to date, left out, failed
    text: str

    def __str__(self) -> str:
        return f"deform_attn for {self.part}: {self.state}: {self.text}"


class BuildError(Exception):
    """Why a part can't be built, in one line."""


class Torch(NamedTuple):
    """The installed torch, found without importing it."""

    folder: Path
    version: str
    cuda: bool  # whether it can use CUDA devices


def find_torch() -> Torch:
    """Raise a BuildError where there is no torch that serves."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed in this environment")
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = re.search(r"__version__ = '(.+?)'", (folder / "version.py").read_text()).group(1)
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise BuildError(f"torch {version} is older than 2.10")
    return Torch(folder, version, (folder / "lib/libtorch_cuda.so").exists())


def find_compiler() -> list[str]:
    """The C++ compiler as the beginning of a command."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in names:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found: {', '.join(command[0] for command in names)}")


def find_nvcc() -> str | None:
    """The CUDA compiler; it knows its own headers, so nothing is concluded from where it lies."""
    home = os.environ.get("CUDA_HOME")
    for path in ([f"{home}/bin"] if home else []) + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]:
        if found := shutil.which("nvcc", path=path):
            return found
    return None


def run(command: list, folder: Path | None = None) -> str:
    """The standard output of a command; a BuildError holds the line in which it says what is wrong."""
    try:
        done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in lines if re.search(r"error|cannot|undefined", line)]
        raise BuildError((wrong or lines or [f"{command[0]} ended with status {done.returncode}"])[0])
    return done.stdout


def cpu_commands(compiler: list[str], torch: Torch, target: Path) -> tuple[list[list], list]:
    """Commands that compile, in any order, and the one that links."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = {f"deform_attn_{name}": vectors if x86 else [] for name, vectors in VECTORS.items()}
    flags["deform_attn"] = ["-isystem", torch.folder / "include"]
    compile_ = [
        [*compiler, *FLAGS, *extra, "-c", f"{name}.cpp", "-o", target.parent / f"{name}.o"]
        for name, extra in flags.items()
    ]
    objects = [command[-1] for command in compile_]
    return compile_, [*compiler, "-shared", *objects, "-o", target, "-L", torch.folder / "lib", "-ltorch_cpu"]


def cuda_commands(nvcc: str, torch: Torch, architectures: list[str], target: Path) -> tuple[list[list], list]:
    """As `cpu_commands`. The CUDA runtime is linked in, so that no library of one version is asked for."""
    codes = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        codes += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            codes += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    object_file = target.parent / "deform_attn_cuda.o"
    source = ["-isystem", torch.folder / "include", "-c", "deform_attn_cuda.cu", "-o", object_file]
    threads = ["--threads", str(os.cpu_count() or 1)]
    libraries = ["-cudart", "static", "-L", torch.folder / "lib", "-ltorch_cpu", "-ltorch_cuda"]
    return [[nvcc, *CUDA_FLAGS, *codes, *threads, *source]], [nvcc, "-shared", object_file, "-o", target, *libraries]


def gpu_capabilities() -> list[str]:
    """Compute capabilities of the GPUs of this machine, such as "9.0"."""
    try:
        text = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except BuildError:
        return []
    found = set(re.findall(r"^\d+\.\d+$", text, re.MULTILINE))
    return sorted(found, key=lambda name: [int(part) for part in name.split(".")])


def cuda_architectures(nvcc: str) -> list[str]:
    """What to build for; the newest comes with PTX, from which a driver makes code for newer GPUs."""
    if wanted := re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        for name in wanted:
            if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0 or 9.0+PTX, not {name}")
        return wanted
    if present := gpu_capabilities():
        return [*present[:-1], f"{present[-1]}+PTX"]
    known = {name.removeprefix("compute_") for name in run([nvcc, "--list-gpu-arch"]).split()}
    return [name for name in CUDA_ARCHITECTURES if name.removesuffix("+PTX").replace(".", "") in known]


def build(folder: Path = FOLDER) -> list[Result]:
    """Build what can be built into `folder`. Never raises; a part that fails leaves what was there before."""
    return [_attempt("cpu", build_cpu, folder), _attempt("cuda", build_cuda, folder)]


def _attempt(part: str, function, folder: Path) -> Result:
    try:
        return function(folder)
    except (BuildError, OSError) as error:
        return Result(part, "failed", str(error))


def build_cpu(folder: Path) -> Result:
    """Raise a BuildError with the reason if the part for the CPU can't be built."""
    torch, compiler = find_torch(), find_compiler()
    made_for = list(VECTORS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    record = {
        "architectures": made_for,
        "compiler": run([*compiler, "--version"]).splitlines()[0],
        "flags": [FLAGS, VECTORS],
        "sources": _digest(SOURCES.glob("deform_attn*.cpp"), SOURCES.glob("deform_attn*.h")),
        "torch": torch.version,
    }
    return _make("cpu", folder, record, lambda target: cpu_commands(compiler, torch, target))


def build_cuda(folder: Path) -> Result:
    """Raise a BuildError with the reason if the part for CUDA was to be built and can't be."""
    nvcc = find_nvcc()
    if nvcc is None:
        return Result("cuda", "left out", "no nvcc found")
    if os.environ.get("FORCE_CUDA", "0") != "1" and not gpu_capabilities():
        return Result("cuda", "left out", "no GPU found (FORCE_CUDA=1 builds it all the same)")
    torch = find_torch()
    if not torch.cuda:
        return Result("cuda", "left out", f"torch {torch.version} is a build without CUDA")
    architectures = cuda_architectures(nvcc)
    record = {
        "architectures": architectures,
        "compiler": run([nvcc, "--version"]).splitlines()[-1],
        "flags": CUDA_FLAGS,
        "sources": _digest(SOURCES.glob("*.cu"), SOURCES.glob("*.cuh"), [SOURCES / "deform_attn.h"]),
        "torch": torch.version,
    }
    return _make("cuda", folder, record, lambda target: cuda_commands(nvcc, torch, architectures, target))


def _digest(*groups: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for group in groups for path in group):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _make(part: str, folder: Path, record: dict, commands) -> Result:
    """Run the commands, unless what they would make is there; the record beside the result says how it was made.

    Another torch is no reason to build again: that is what the stable ABI is for.
    """
    final = folder / f"_deform_attn_{part}.so"
    made_for = f"for {', '.join(record['architectures'])}, by {record['compiler']}"
    before = read_record(part, folder)
    if final.exists() and before and {**before, "torch": ""} == {**record, "torch": ""}:
        return Result(part, "up to date", made_for)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build") as temporary:
        target = Path(temporary) / final.name
        compile_, link = commands(target)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: run(command, SOURCES), compile_))
        run(link, SOURCES)
        os.replace(target, final)
    final.with_suffix(".json").write_text(json.dumps(record, indent=1))
    return Result(part, "built", made_for)


def read_record(part: str, folder: Path = FOLDER) -> dict | None:
    """How the shared object of a part was made; None where that is not known."""
    try:
        return json.loads((folder / f"_deform_attn_{part}.json").read_text())
    except (OSError, ValueError):
        return None


def main() -> int:
    """Build, print one line for each part, and return 1 if one failed."""
    results = build()
    for result in results:
        print(result, file=sys.stderr if result.state == "failed" else sys.stdout)
    if results[0].state == "failed":
        print("deform_attn runs as plain PyTorch on the CPU", file=sys.stderr)
    return int(any(result.state == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
