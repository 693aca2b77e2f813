"""`python -m dino.layers.ops.build`: compile the deformable attention operator into the installed package.

Needs torch >= 2.10, a few seconds, write access to the package, and a C++17 compiler: the one that the variable CXX
names, else the first that succeeds of c++, g++, clang++ and those with a version in their names. GCC must be 10 or
newer, Clang 13 or newer. Where nvcc is found (in CUDA_HOME, on the PATH, in /usr/local/cuda), the part for CUDA is
built too if there is a GPU or FORCE_CUDA=1. Its architectures are TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX", else
those of the GPUs present, else all from 7.5 on. Parts that are up to date stay. The package works without the operator,
as plain PyTorch.

A run makes three shared objects. The schema names the operators; it has no kernels, so any C++ compiler can make it,
also nvcc alone. The parts for the CPU and for CUDA need the schema, but not each other. A run replaces all its files
together, at its end.

setup.py runs this file before the package exists, so it imports the standard library only.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
_SOURCES = FOLDER / "csrc"
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # LibTorch's stable ABI as of 2.10
_SCHEMA_FLAGS = ["-std=c++17", "-O2", _TORCH_TARGET]
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", _TORCH_TARGET]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Some compilers link the C++ library statically. Such a copy must not mix with torch's.
_PRIVATE = "--exclude-libs=ALL"
_VECTORS = {"generic": [], "avx2": _AVX2, "avx512": _AVX512}
_CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-DUSE_CUDA", _TORCH_TARGET]
_CUDA_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
_WITH_VERSION = [
    *(f"g++-{number}" for number in range(16, 9, -1)),
    *(f"clang++-{number}" for number in range(22, 12, -1)),
]
_COMPILERS = ["c++", "g++", "clang++", *_WITH_VERSION]  # in the order in which they are tried
_CXX_ADVICE = "install g++ 10 or clang++ 13 or newer, or name one in CXX"
_ADVICE = {
    "schema": _CXX_ADVICE,
    "cpu": _CXX_ADVICE,
    "cuda": "name a toolkit of torch's CUDA version in CUDA_HOME, and a host compiler that it takes by"
    " NVCC_PREPEND_FLAGS='-ccbin g++-12'",
}


_READY = ("built", "up to date")  # states of parts that can be used


class _Result(NamedTuple):
    """The outcome of one part, "cpu" or "cuda"."""

    part: str
    state: str  # built, up to date, left out, failed
    text: str  # several lines where the part failed

    def __str__(self) -> str:
        return f"deform_attn for {self.part}: {self.state}: {self.text}"


class BuildError(Exception):
    """Why a part can't be built, in one line."""


class LeftOut(Exception):
    """Why a part is left out here, in one line."""


class _Compiler(NamedTuple):
    """A compiler of C++ or CUDA."""

    command: list[str]  # begins all commands
    version: str

    def __str__(self) -> str:
        return " ".join([Path(self.command[0]).name, *self.command[1:], self.version])


class _Torch(NamedTuple):
    """The installed torch, found without importing it."""

    folder: Path
    version: str
    cuda: bool  # whether it can use CUDA devices


def _find_torch() -> _Torch:
    """Find the installed torch; raise a BuildError without one of 2.10 or newer."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed in this environment")
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = re.search(r"__version__ = '(.+?)'", (folder / "version.py").read_text()).group(1)
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise BuildError(f"torch {version} is older than 2.10")
    return _Torch(folder, version, (folder / "lib/libtorch_cuda.so").exists())


def _find_compilers() -> list[_Compiler]:
    """The C++ compilers to try, in order, each once even if it has several names. Raise a BuildError without one."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"no C++ compiler found: CXX can't be read: {error}") from error
    found = {}
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            compiler = _Compiler(command, _version(command))
            found.setdefault(compiler.version, compiler)
    if not found:
        where = f"CXX names {chosen[0]}" if chosen else f"neither {', '.join(_COMPILERS[:3])} nor one by its version"
        raise BuildError(f"no C++ compiler found: {where}; {_CXX_ADVICE}")
    return list(found.values())


def _version(command: list[str], line_number: int = 0) -> str:
    try:
        line = run([*command, "--version"]).splitlines()[line_number]
    except (BuildError, IndexError):
        return "of unknown version"
    return line.removeprefix(Path(command[0]).name).strip()  # GCC prints its command first


def _find_nvcc() -> _Compiler | None:
    """Find the CUDA compiler, which finds its own headers."""
    home = os.environ.get("CUDA_HOME")
    for path in ([f"{home}/bin"] if home else []) + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]:
        if found := shutil.which("nvcc", path=path):
            return _Compiler([found], _version([found], -1))
    return None


def run(command: list, folder: Path | None = None) -> str:
    """Run a command and return its standard output; a BuildError quotes the line that names the error."""
    try:
        done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in lines if re.search(r"error|cannot|undefined", line)]
        raise BuildError((wrong or lines or [f"{command[0]} ended with status {done.returncode}"])[0])
    return done.stdout


def _schema_commands(compiler: _Compiler, torch: _Torch, target: Path) -> tuple[list[list], list]:
    """Commands that compile, in any order, and the one that links. The compiler may be nvcc."""
    nvcc = Path(compiler.command[0]).name == "nvcc"
    flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden"] if nvcc else ["-fPIC", "-fvisibility=hidden"]
    object_file = target.with_suffix(".o")
    source = ["-isystem", torch.folder / "include", "-c", "deform_attn_schema.cpp", "-o", object_file]
    libraries = [*(["-cudart", "none"] if nvcc else []), "-L", torch.folder / "lib", "-ltorch_cpu"]
    libraries += ["-Xlinker", _PRIVATE] if nvcc else [f"-Wl,{_PRIVATE}"]
    compile_ = [*compiler.command, *_SCHEMA_FLAGS, *flags, *source]
    return [compile_], [*compiler.command, "-shared", object_file, "-o", target, *libraries]


def _cpu_commands(compiler: _Compiler, torch: _Torch, target: Path) -> tuple[list[list], list]:
    """As `_schema_commands`."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = {f"deform_attn_{name}": vectors if x86 else [] for name, vectors in _VECTORS.items()}
    flags["deform_attn"] = ["-isystem", torch.folder / "include"]
    compile_ = [
        [*compiler.command, *_FLAGS, *extra, "-c", f"{name}.cpp", "-o", target.parent / f"{name}.o"]
        for name, extra in flags.items()
    ]
    objects = [command[-1] for command in compile_]
    libraries = ["-L", torch.folder / "lib", "-ltorch_cpu", f"-Wl,{_PRIVATE}"]
    return compile_, [*compiler.command, "-shared", *objects, "-o", target, *libraries]


def _cuda_commands(nvcc: _Compiler, torch: _Torch, architectures: list[str], target: Path) -> tuple[list[list], list]:
    """As `_schema_commands`. Links the CUDA runtime statically, so that no library of one version is needed."""
    codes = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        codes += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            codes += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    object_file = target.parent / "deform_attn_cuda.o"
    source = ["-isystem", torch.folder / "include", "-c", "deform_attn_cuda.cu", "-o", object_file]
    threads = ["--threads", str(os.cpu_count() or 1)]
    libraries = ["-cudart", "static", "-L", torch.folder / "lib", "-ltorch_cpu", "-ltorch_cuda", "-Xlinker", _PRIVATE]
    compile_ = [*nvcc.command, *_CUDA_FLAGS, *codes, *threads, *source]
    return [compile_], [*nvcc.command, "-shared", object_file, "-o", target, *libraries]


def _gpu_capabilities() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as "9.0"."""
    try:
        text = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except BuildError:
        return []
    found = set(re.findall(r"^\d+\.\d+$", text, re.MULTILINE))
    return sorted(found, key=lambda name: [int(part) for part in name.split(".")])


def _cuda_architectures(nvcc: _Compiler) -> list[str]:
    """The architectures to build for. The newest has PTX, which a driver compiles for newer GPUs."""
    if wanted := re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        for name in wanted:
            if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0 or 9.0+PTX, not {name}")
        return wanted
    if present := _gpu_capabilities():
        return [*present[:-1], f"{present[-1]}+PTX"]
    known = {name.removeprefix("compute_") for name in run([*nvcc.command, "--list-gpu-arch"]).split()}
    return [name for name in _CUDA_ARCHITECTURES if name.removesuffix("+PTX").replace(".", "") in known]


class _Plan(NamedTuple):
    """How to build a part."""

    part: str
    torch: _Torch
    compilers: list[_Compiler]  # in the order of trial
    record: dict  # everything that determines the result, except the compiler
    commands: Callable[[_Compiler, _Torch, Path], tuple[list[list], list]]

    def record_by(self, compiler: _Compiler) -> dict:
        """The record beside the shared object. Its torch informs people only: another one causes no rebuild."""
        return {**self.record, "compiler": str(compiler), "torch": self.torch.version}


def _plan_schema() -> _Plan:
    """Plan the schema; raise a BuildError without a compiler."""
    nvcc = _find_nvcc()
    try:
        compilers = _find_compilers()
    except BuildError:
        if nvcc is None:
            raise
        compilers = []
    record = {"architectures": ["all"], "flags": _SCHEMA_FLAGS, "schema": _schema()}
    return _Plan("schema", _find_torch(), compilers + ([nvcc] if nvcc else []), record, _schema_commands)


def _plan_cpu() -> _Plan:
    """Plan the part for the CPU; raise a BuildError with the reason if it can't be built."""
    record = {
        "architectures": list(_VECTORS) if platform.machine() in ("x86_64", "AMD64") else ["generic"],
        "flags": [_FLAGS, _VECTORS],
        "sources": _digest(_SOURCES.glob("deform_attn*.cpp"), _SOURCES.glob("deform_attn*.h")),
        "schema": _schema(),
    }
    return _Plan("cpu", _find_torch(), _find_compilers(), record, _cpu_commands)


def _plan_cuda() -> _Plan:
    """Plan the part for CUDA; raise LeftOut where it is not wanted, a BuildError where it can't be built."""
    nvcc = _find_nvcc()
    if nvcc is None:
        raise LeftOut("no nvcc found")
    if os.environ.get("FORCE_CUDA", "0") != "1" and not _gpu_capabilities():
        raise LeftOut("no GPU found (FORCE_CUDA=1 builds it all the same)")
    torch = _find_torch()
    if not torch.cuda:
        raise LeftOut(f"torch {torch.version} is a build without CUDA")
    architectures = _cuda_architectures(nvcc)
    record = {
        "architectures": architectures,
        "flags": _CUDA_FLAGS,
        "sources": _digest(_SOURCES.glob("*.cu"), _SOURCES.glob("*.cuh"), [_SOURCES / "deform_attn.h"]),
        "schema": _schema(),
    }
    return _Plan("cuda", torch, [nvcc], record, lambda *others: _cuda_commands(*others[:2], architectures, others[2]))


PLANS = {"cpu": _plan_cpu, "cuda": _plan_cuda}


def _schema() -> str:
    return _digest([_SOURCES / "deform_attn_schema.cpp"])


def _digest(*groups: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for group in groups for path in group):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _file_of(part: str, folder: Path = FOLDER) -> Path:
    """The path of the shared object of "schema", "cpu" or "cuda"."""
    return folder / f"_deform_attn_{part}.so"


def build(folder: Path = FOLDER, parts: Sequence[str] = tuple(PLANS)) -> list[_Result]:
    """Build the parts that can be built into `folder`, and the schema.

    Never raises. Where a part fails, its old file stays. If that file does not fit a new schema, all old files stay.
    """
    outcomes = [_planned(PLANS[part], part, folder) for part in parts]
    if not any(isinstance(outcome, _Plan) or outcome.state == "up to date" for outcome in outcomes):
        return outcomes
    schema = _planned(_plan_schema, "schema", folder)
    try:
        return _carry_out(schema, outcomes, folder)
    except OSError as error:
        return [_but_failed(outcome, str(error)) if isinstance(outcome, _Plan) else outcome for outcome in outcomes]


def _planned(plan: Callable[[], _Plan], part: str, folder: Path) -> _Plan | _Result:
    """The plan of a part, or its result where there is nothing to do."""
    try:
        wanted = plan()
    except LeftOut as reason:
        return _Result(part, "left out", str(reason))
    except (BuildError, OSError) as error:
        return _Result(part, "failed", str(error))
    before = read_record(part, folder)
    if before and _file_of(part, folder).exists():
        any_compiler = part == "schema"  # it has no kernels
        for compiler in wanted.compilers:
            record = {**wanted.record_by(compiler), "torch": before.get("torch")}
            if record == before or (any_compiler and {**record, "compiler": before.get("compiler")} == before):
                return _Result(part, "up to date", _made_for(before))
    return wanted


def _made_for(record: dict) -> str:
    return f"for {', '.join(record['architectures'])}, by {record['compiler']}"


def _carry_out(schema: _Plan | _Result, outcomes: list[_Plan | _Result], folder: Path) -> list[_Result]:
    """Build the planned parts in a temporary folder, then move all of them, or none if they would not fit together."""
    if not any(isinstance(outcome, _Plan) for outcome in [schema, *outcomes]):
        return _stopped(outcomes, schema.text) if schema.state == "failed" else outcomes
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build") as temporary:
        stage = Path(temporary)
        schema, *results = [_make(x, stage) if isinstance(x, _Plan) else x for x in [schema, *outcomes]]
        reason = schema.text if schema.state == "failed" else _conflict(schema, results, folder)
        if reason:
            return _stopped(results, reason)
        for path in [*stage.glob("*.so"), *stage.glob("*.json")]:
            os.replace(path, folder / path.name)
    return results


def _stopped(outcomes: list[_Plan | _Result], reason: str) -> list[_Result]:
    """The outcomes where nothing is installed, for this reason."""
    return [_but_failed(outcome, reason) for outcome in outcomes]


def _but_failed(outcome: _Plan | _Result, reason: str) -> _Result:
    """The outcome of a part that is not installed for this reason."""
    ready = isinstance(outcome, _Plan) or outcome.state in _READY
    return _Result(outcome.part, "failed", reason) if ready else outcome


def _conflict(schema: _Result, results: list[_Result], folder: Path) -> str:
    """Why the new files do not fit the files that would stay; empty if they fit."""
    if schema.state != "built":
        return ""
    outcomes = {result.part: result for result in results}
    for part in PLANS:
        outcome = outcomes.get(part)
        if not _fits(part, outcome, folder):
            why = f" ({outcome.text})" if outcome else ""
            return (
                f"the schema is new, and the existing part for {part} was not built for it{why}; nothing was replaced:"
                f" build both parts together, or remove {_file_of(part, folder)}"
            )
    return ""


def _fits(part: str, outcome: _Result | None, folder: Path) -> bool:
    """Whether a part is new, absent, or was built with the present schema.

    A part needs the schema that it was built with. A part that is older than the schema file includes another schema.
    """
    if (outcome and outcome.state in _READY) or not _file_of(part, folder).exists():
        return True
    record = read_record(part, folder)
    return record is not None and record.get("schema") == _schema()


def _make(plan: _Plan, stage: Path) -> _Result:
    """Build a part by the first compiler that succeeds, with a record beside the shared object."""
    target, failures = _file_of(plan.part, stage), []
    for compiler in plan.compilers:
        compile_, link = plan.commands(compiler, plan.torch, target)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda command: run(command, _SOURCES), compile_))
            run(link, _SOURCES)
        except BuildError as error:
            failures.append(f"{compiler} failed: {error}")
            target.unlink(missing_ok=True)
            continue
        record = plan.record_by(compiler)
        target.with_suffix(".json").write_text(json.dumps(record, indent=1))
        return _Result(plan.part, "built", "; ".join([_made_for(record), *failures]))
    lines = [f"with torch {plan.torch.version}", *failures, f"the old files stay; {_ADVICE[plan.part]}"]
    return _Result(plan.part, "failed", "\n  ".join(lines))


def read_record(part: str, folder: Path = FOLDER) -> dict | None:
    """The record of how a part was built; None if it is unknown."""
    try:
        return json.loads(_file_of(part, folder).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None


def main() -> int:
    """Build, print one line for each part, and return 1 if one failed."""
    results = build()
    for result in results:
        print(result, file=sys.stderr if result.state == "failed" else sys.stdout)
    if results[0].state == "failed" and not _file_of("cpu").exists():
        print("deform_attn runs as plain PyTorch on the CPU", file=sys.stderr)
    return int(any(result.state == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
