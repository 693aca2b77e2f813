"""Building the compiled operator: what is asked of the compilers, and what happens where something is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dino import build

ROOT = Path(__file__).parents[1]

COMPILER = """#!/bin/sh
case " $* " in *" --version "*) echo "test compiler 1.0"; exit 0 ;; esac
echo "$@" >> "$LOG"
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""
FAILING = """#!/bin/sh
case " $* " in *" --version "*) echo "test compiler 1.0"; exit 0 ;; esac
echo "In file included from somewhere" >&2
echo "deform_attn.cpp:1:1: fatal error: stable/library.h: No such file or directory" >&2
echo "compilation terminated, with another error" >&2
exit 1
"""
NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Build cuda_test"; exit 0 ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_120\\n'; exit 0 ;;
esac
echo "$@" >> "$LOG"
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Install programs by name; nothing else is on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def install(**scripts):
        for name, text in scripts.items():
            path = programs / name.replace("_", "-")
            path.write_text(text)
            path.chmod(0o755)

    for name in ("sh", "touch"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for name in ("CXX", "CUDA_HOME", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: real(name, path=str(programs)))
    install.log = tmp_path / "log"
    install.target = tmp_path / "package"
    return install


def test_without_compilers(machine):
    cpu, cuda = build.build(machine.target)
    assert str(cpu) == "deform_attn for cpu: failed: no C++ compiler found: c++, g++, clang++"
    assert str(cuda) == "deform_attn for cuda: left out: no nvcc found"
    assert not machine.target.exists()


def test_builds_once(machine, monkeypatch):
    machine(**{"g++": COMPILER})
    result = build.build_cpu(machine.target)
    assert result.state == "built"
    assert "by test compiler 1.0" in result.text
    assert sorted(path.name for path in machine.target.iterdir()) == ["_deform_attn_cpu.json", "_deform_attn_cpu.so"]
    calls = machine.log.read_text()
    assert build.build_cpu(machine.target).state == "up to date"
    assert machine.log.read_text() == calls
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    assert build.build_cpu(machine.target).state == "built"
    machine(**{"g++": COMPILER.replace("1.0", "2.0")})
    assert build.build_cpu(machine.target).state == "built"


def test_another_torch_needs_no_new_build(machine):
    machine(**{"g++": COMPILER})
    build.build_cpu(machine.target)
    record = machine.target / "_deform_attn_cpu.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.10.0"}))
    assert build.build_cpu(machine.target).state == "up to date"


def test_a_failing_build_says_one_reason_and_leaves_what_was_there(machine, capsys, monkeypatch):
    machine(**{"g++": FAILING})
    machine.target.mkdir()
    (machine.target / "_deform_attn_cpu.so").write_text("older")
    monkeypatch.setattr(build, "build", lambda: [build._attempt("cpu", build.build_cpu, machine.target)])
    assert build.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("deform_attn for cpu: failed: deform_attn.cpp:1:1: fatal error: stable/library.h")
    assert len(lines) == 2
    assert [path.read_text() for path in machine.target.iterdir()] == ["older"]


def test_folder_that_cannot_be_written(machine, tmp_path):
    machine(**{"g++": COMPILER})
    (tmp_path / "file").write_text("")
    assert build.build(tmp_path / "file" / "package")[0].state == "failed"


def test_torch_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="torch is not installed"):
        build.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    spec = build.importlib.machinery.ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(build.BuildError, match=r"torch 2\.9\.1\+cpu is older than 2\.10"):
        build.find_torch()


@pytest.fixture
def torch_with_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_torch", lambda: build.Torch(tmp_path, "2.14.1+cu130", True))


def test_cuda_needs_a_gpu_or_force(machine, torch_with_cuda, monkeypatch):
    machine(nvcc=NVCC)
    assert "FORCE_CUDA=1" in build.build_cuda(machine.target).text
    monkeypatch.setenv("FORCE_CUDA", "1")
    result = build.build_cuda(machine.target)
    assert result.state == "built"
    assert result.text.startswith("for 8.0, 9.0, 12.0+PTX, by Build cuda_test")
    compile_, link = machine.log.read_text().splitlines()
    assert "code=sm_80 -gencode arch=compute_90,code=sm_90" in compile_
    assert "code=sm_120 -gencode arch=compute_120,code=compute_120" in compile_
    assert "-cudart static" in link
    assert (machine.target / "_deform_attn_cuda.so").exists()


def test_cuda_for_the_gpus_that_are_there(machine, torch_with_cuda, monkeypatch):
    machine(nvcc=NVCC, nvidia_smi="#!/bin/sh\nprintf '12.0\\n9.0\\n9.0\\n'\n")
    assert build.build_cuda(machine.target).text.startswith("for 9.0, 12.0+PTX,")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;8.6 9.0a+PTX")
    assert build.build_cuda(machine.target).text.startswith("for 8.0, 8.6, 9.0a+PTX,")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="not Hopper"):
        build.build_cuda(machine.target)


def test_cuda_needs_a_torch_with_cuda(machine, monkeypatch, tmp_path):
    machine(nvcc=NVCC)
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "find_torch", lambda: build.Torch(tmp_path, "2.13.0+cpu", False))
    assert build.build_cuda(machine.target).state == "left out"


def test_setup_builds_where_it_can(tmp_path):
    """The commands of `pip install`, on a copy: with a compiler, without one, without torch."""
    shutil.copytree(ROOT / "dino", tmp_path / "dino", ignore=shutil.ignore_patterns("*.so", "_deform_attn_*.json"))
    for name in ("configs", "projects"):  # recipes travel in the package
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    without = (
        "import sys; sys.modules['torch'] = None; import runpy; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"
    )
    for program, environment in ((["setup.py"], {"CXX": "no-such-compiler"}), (["-c", without], {})):
        command = [sys.executable, *program, "-q", "build", "--build-lib", "built"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "the compiled attention operator is left out: " in done.stdout
        assert (tmp_path / "built/dino/layers/csrc/deform_attn.cpp").exists()
        assert not list(tmp_path.rglob("*.so"))
