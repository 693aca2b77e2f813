"""The operator's sources against every torch from 2.10 on: the names they use, what they link to, what compiles.

The headers of the versions that are not installed lie in DINO_TORCH_HEADERS as torch-VERSION/torch/include, by default
in output/torch_headers, where the first run puts them (80 MB of download for each).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from dino.layers.ops import build

from . import compiled

VERSIONS = ["2.10.0", "2.11.0", "2.12.1", "2.13.0"]
FOLDER = Path(os.environ.get("DINO_TORCH_HEADERS", compiled.ROOT / "output/torch_headers"))
NAMES = re.compile(r"\b(?:torch::[A-Za-z]+::(?:[A-Za-z]+::)?\w+|(?:aoti|torch|STD|STABLE|TORCH|THO|C10|AT)_\w+)\b")
IN_OLDEST = {  # that torch 2.10 has, with the same meaning; test_names_are_in_the_oldest_headers looks
    "STABLE_TORCH_LIBRARY",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_CUDA_KERNEL_LAUNCH_CHECK",
    "TORCH_BOX",
    "aoti_torch_get_current_cuda_stream",
    "torch::headeronly::ScalarType",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::clone",
    "torch::stable::contiguous",
    "torch::stable::new_empty",
    "torch::stable::new_zeros",
    "torch::stable::parallel_for",
    "torch::stable::to",
}
# Others can't say what a number of the ABI is, so that it stands here once more.
OLDEST = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"


def names_in_sources():
    texts = [path.read_text() for path in build._SOURCES.iterdir()]
    return {name for text in texts for name in NAMES.findall(re.sub(r"//.*", "", text))}


def test_no_name_is_newer_than_the_oldest_torch():
    """A macro or a function of newer headers is no part of the ABI's version, and compiles only where it is."""
    assert names_in_sources() - IN_OLDEST == set(), "look whether torch 2.10 has these before they are added here"


def test_symbols_are_of_the_oldest_abi(tmp_path):
    """What the shared objects want of torch is declared for programs that are made for 2.10."""
    folder = compiled.folder_of_operator(tmp_path)
    if not shutil.which("nm"):
        pytest.skip("no nm")
    source = tmp_path / "declared.cpp"
    headers = ["csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/c/shim.h"]
    source.write_text("".join(f"#include <torch/{header}>\n" for header in headers))
    include = ["-isystem", build._find_torch().folder / "include"]
    compiler = build._find_compilers()[0].command
    declared = build.run([*compiler, "-std=c++17", "-E", "-DUSE_CUDA", OLDEST, *include, source])
    wanted = set()
    for path in folder.glob("_deform_attn_*.so"):
        symbols = build.run(["nm", "-D", "--undefined-only", path]).split()
        wanted |= {name.split("@")[0] for name in symbols if re.search("aoti|torch|c10|at::", name)}
    assert {"aoti_torch_library_def", "torch_parallel_for"} <= wanted
    assert wanted <= set(re.findall(r"\w+", declared))


def headers_of(version):
    """As a `build.Torch`, of which only the headers are there."""
    folder = FOLDER / f"torch-{version}/torch"
    if not (folder / "include").exists():
        with tempfile.TemporaryDirectory() as temporary:
            download(version, Path(temporary))
    return build._Torch(folder, version, True)


def download(version, temporary):
    """The wheel for macOS has the headers that are asked for, like the one for CUDA, which is ten times as large."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--platform=macosx_15_0_arm64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--retries=1", *options, "-d", str(temporary)]
    done = subprocess.run([*command, f"torch=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"headers of torch {version} can't be had: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as unpacked, zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith("torch/include/")])
        (FOLDER / f"torch-{version}").mkdir(exist_ok=True)
        os.replace(Path(unpacked) / "torch", FOLDER / f"torch-{version}/torch")


@pytest.fixture(params=[*VERSIONS, "installed"])
def torch(request):
    return build._find_torch() if request.param == "installed" else headers_of(request.param)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_names_are_in_the_oldest_headers():
    include = headers_of(VERSIONS[0]).folder / "include/torch"
    texts = [
        path.read_text()
        for part in ("csrc/stable", "csrc/inductor", "headeronly")
        for path in (include / part).rglob("*.h")
    ]
    words = set(re.findall(r"\w+", "\n".join(texts)))
    assert {name.split("::")[-1] for name in IN_OLDEST} <= words


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_schema_and_cpu_part_compile(torch, tmp_path):
    compiler = build._find_compilers()[0]
    for commands in (build._schema_commands, build._cpu_commands):
        compile_, _ = commands(compiler, torch, tmp_path / "part.so")
        for command in compile_:
            build.run(command, build._SOURCES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cuda_part_compiles(torch, tmp_path):
    """For all GPUs with the oldest and with the installed torch, for one with the others: it takes minutes."""
    nvcc = build._find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    between = torch.version in VERSIONS[1:]
    architectures = ["9.0"] if between else build._CUDA_ARCHITECTURES
    (command,), _ = build._cuda_commands(nvcc, torch, architectures, tmp_path / "part.so")
    build.run(command, build._SOURCES)
    assert (tmp_path / "deform_attn_cuda.o").stat().st_size > 100_000
