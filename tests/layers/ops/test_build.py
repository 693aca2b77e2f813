"""Building the compiled operator: what is asked of the compilers, and what happens where something is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dino.layers.ops import build

ROOT = Path(__file__).parents[3]

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


@pytest.fixture
def torch_with_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_find_torch", lambda: build._Torch(tmp_path, "2.14.1+cu130", True))


def build_cpu(folder):
    return build.build(folder, ["cpu"])[0]


def build_cuda(folder):
    return build.build(folder, ["cuda"])[0]


def in_place(folder):
    """{name: content} of the shared objects."""
    return {path.name: path.read_text() for path in folder.glob("*.so")}


CPU, CUDA, SCHEMA = "_deform_attn_cpu.so", "_deform_attn_cuda.so", "_deform_attn_schema.so"


def test_without_compilers(machine):
    cpu, cuda = build.build(machine.target)
    assert str(cpu).startswith("deform_attn for cpu: failed: no C++ compiler found: neither c++, g++, clang++ nor one")
    assert str(cuda) == "deform_attn for cuda: left out: no nvcc found"
    assert not machine.target.exists()


def test_builds_once(machine, monkeypatch):
    machine(**{"g++": COMPILER})
    result = build_cpu(machine.target)
    assert result.state == "built"
    assert result.text == "for generic, avx2, avx512, by g++ test compiler 1.0"
    names = [CPU, SCHEMA, CPU.replace("so", "json"), SCHEMA.replace("so", "json")]
    assert sorted(path.name for path in machine.target.iterdir()) == sorted(names)
    calls = machine.log.read_text()
    assert build_cpu(machine.target).state == "up to date"
    assert machine.log.read_text() == calls
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-g"])
    assert build_cpu(machine.target).state == "built"
    machine(**{"g++": COMPILER.replace("1.0", "2.0")})
    assert build_cpu(machine.target).state == "built"
    assert machine.log.read_text().count("schema.cpp") == 1, "any compiler's schema serves"
    monkeypatch.setenv("CXX", "g++ -march=native")
    assert build_cpu(machine.target).text.endswith("by g++ -march=native test compiler 2.0")
    assert "-march=native -std=c++17 -O3" in machine.log.read_text()


def test_another_torch_needs_no_new_build(machine):
    machine(**{"g++": COMPILER})
    build_cpu(machine.target)
    for record in machine.target.glob("*.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.10.0"}))
    calls = machine.log.read_text()
    assert build_cpu(machine.target).state == "up to date"
    assert machine.log.read_text() == calls


# ---- choice of a compiler


def test_the_next_compiler_is_tried(machine):
    machine(**{"c++": FAILING, "g++": FAILING.replace("1.0", "2.0"), "clang++-14": COMPILER.replace("1.0", "3.0")})
    result = build_cpu(machine.target)
    assert result.state == "built"
    assert "by clang++-14 test compiler 3.0; c++ test compiler 1.0 failed: deform_attn" in result.text
    assert "; g++ test compiler 2.0 failed: deform_attn" in result.text
    assert build_cpu(machine.target).text == "for generic, avx2, avx512, by clang++-14 test compiler 3.0"


def test_one_compiler_of_several_names_is_tried_once(machine):
    named = 'case "$*" in --version) echo "${0##*/} (Test) 12.2"; exit 0 ;; esac\n'
    text = FAILING.replace("#!/bin/sh\n", "#!/bin/sh\n" + named)
    machine(**{"c++": text, "g++": text, "g++-12": text})
    assert build_cpu(machine.target).text.count("failed:") == 1


def test_cxx_is_the_only_one_to_be_tried(machine, monkeypatch):
    machine(**{"g++": COMPILER, "mine": FAILING})
    for value, text in (
        ("mine -O1", "mine -O1 test compiler 1.0 failed: deform_attn"),
        ("absent", "CXX names absent; install g++ 10"),
        ("g++ '", "CXX can't be read: No closing quotation"),
    ):
        monkeypatch.setenv("CXX", value)
        result = build_cpu(machine.target)
        assert result.state == "failed"
        assert text in result.text


def test_a_failing_build_says_all_and_leaves_what_was_there(machine, capsys, monkeypatch):
    machine(**{"g++": FAILING, "clang++": FAILING.replace("1.0", "2.0")})
    machine.target.mkdir()
    (machine.target / CPU).write_text("older")
    everything = build.build
    monkeypatch.setattr(build, "build", lambda: everything(machine.target, ["cpu"]))
    monkeypatch.setattr(build, "FOLDER", machine.target)
    assert build.main() == 1
    version = build._find_torch().version
    reason = "deform_attn.cpp:1:1: fatal error: stable/library.h: No such file or directory"
    assert capsys.readouterr().err.splitlines() == [
        f"deform_attn for cpu: failed: with torch {version}",
        f"  g++ test compiler 1.0 failed: {reason}",
        f"  clang++ test compiler 2.0 failed: {reason}",
        "  the old files stay; install g++ 10 or clang++ 13 or newer, or name one in CXX",
    ]
    assert [path.read_text() for path in machine.target.iterdir()] == ["older"]


def test_without_any_build_it_says_what_runs(machine, capsys, monkeypatch):
    everything = build.build
    monkeypatch.setattr(build, "build", lambda: everything(machine.target))
    monkeypatch.setattr(build, "_file_of", lambda part: machine.target / part)
    assert build.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "deform_attn runs as plain PyTorch on the CPU"


def test_folder_that_cannot_be_written(machine, tmp_path):
    machine(**{"g++": COMPILER})
    (tmp_path / "file").write_text("")
    assert build.build(tmp_path / "file" / "package")[0].state == "failed"


def test_a_broken_nvcc_does_not_matter_to_the_cpu(machine):
    machine(**{"g++": COMPILER, "nvcc": "#!/bin/sh\nexit 1\n"})
    assert build_cpu(machine.target).state == "built"


# ---- the schema and the parts


@pytest.fixture
def old_build(machine, torch_with_cuda):
    """Of before the schema was a part of its own: both parts, made in another way."""
    machine.target.mkdir()
    for part in build.PLANS:
        build._file_of(part, machine.target).write_text("old")
        record = {"architectures": ["old"], "compiler": "old", "flags": [], "sources": "old", "torch": "2.10.0"}
        build._file_of(part, machine.target).with_suffix(".json").write_text(json.dumps(record))


NOT_KERNELS = FAILING.replace('echo "In', 'case "$*" in *-shared*|*schema.cpp*) OUT ;; esac\necho "In').replace(
    "OUT", 'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done; exit 0'
)  # what can't compile the CPU kernels


def test_an_old_build_is_made_again(machine, old_build, monkeypatch):
    machine(**{"g++": COMPILER, "nvcc": NVCC})
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert [result.state for result in build.build(machine.target)] == ["built", "built"]
    assert in_place(machine.target) == dict.fromkeys([CPU, CUDA, SCHEMA], "")
    assert [result.state for result in build.build(machine.target)] == ["up to date", "up to date"]


@pytest.mark.parametrize("failing", ["g++", "nvcc", "no GPU"])
def test_half_of_a_build_does_not_mix_with_an_old_one(machine, old_build, monkeypatch, failing):
    machine(**{"g++": COMPILER, "nvcc": NVCC})
    if failing != "no GPU":
        monkeypatch.setenv("FORCE_CUDA", "1")
        machine(**{failing: NOT_KERNELS})
    cpu, cuda = build.build(machine.target)
    assert in_place(machine.target) == dict.fromkeys([CPU, CUDA], "old")
    assert [json.loads(path.read_text())["flags"] for path in machine.target.glob("*.json")] == [[], []]
    assert len(list(machine.target.iterdir())) == 4
    stopped, part = (cuda, "cpu") if failing == "g++" else (cpu, "cuda")
    assert stopped.text.startswith(f"the schema is new, and the existing part for {part} was not built for it")
    assert stopped.text.endswith(f"or remove {machine.target}/_deform_attn_{part}.so")


def test_cuda_does_without_the_cpu_kernels(machine, torch_with_cuda, monkeypatch):
    machine(**{"g++": NOT_KERNELS, "nvcc": NVCC})
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert [result.state for result in build.build(machine.target)] == ["failed", "built"]
    assert set(in_place(machine.target)) == {CUDA, SCHEMA}
    assert "schema" not in build.build(machine.target)[0].text


@pytest.mark.parametrize("compilers", [{}, {"g++": FAILING}])
def test_nvcc_alone_makes_schema_and_cuda(machine, torch_with_cuda, monkeypatch, compilers):
    machine(**compilers, nvcc=NVCC)
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert [result.state for result in build.build(machine.target)] == ["failed", "built"]
    assert set(in_place(machine.target)) == {CUDA, SCHEMA}
    assert "-Xcompiler -fPIC,-fvisibility=hidden" in machine.log.read_text()


def test_a_part_that_fails_later_leaves_the_other_alone(machine, torch_with_cuda, monkeypatch):
    machine(**{"g++": COMPILER, "nvcc": NVCC})
    monkeypatch.setenv("FORCE_CUDA", "1")
    build.build(machine.target)
    for name in (CPU, CUDA):
        (machine.target / name).write_text("older")
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-g"])
    monkeypatch.setattr(build, "_CUDA_FLAGS", [*build._CUDA_FLAGS, "-g"])
    machine(**{"g++": FAILING})
    cpu, cuda = build.build(machine.target)
    assert (cpu.state, cuda.state) == ("failed", "built")
    assert in_place(machine.target) == {CPU: "older", CUDA: "", SCHEMA: ""}


def test_a_lost_schema_is_made_again(machine):
    machine(**{"g++": COMPILER})
    build_cpu(machine.target)
    (machine.target / SCHEMA).unlink()
    machine(**{"g++": FAILING.replace("2.0", "1.0")})
    assert build_cpu(machine.target).state == "failed"
    machine(**{"g++": COMPILER})
    assert build_cpu(machine.target).state == "up to date"
    assert (machine.target / SCHEMA).exists()


def test_torch_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="torch is not installed"):
        build._find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    spec = build.importlib.machinery.ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(build.BuildError, match=r"torch 2\.9\.1\+cpu is older than 2\.10"):
        build._find_torch()


def test_cuda_needs_a_gpu_or_force(machine, torch_with_cuda, monkeypatch):
    machine(nvcc=NVCC)
    assert "FORCE_CUDA=1" in build_cuda(machine.target).text
    monkeypatch.setenv("FORCE_CUDA", "1")
    result = build_cuda(machine.target)
    assert result.state == "built", result
    assert result.text.startswith("for 8.0, 9.0, 12.0+PTX, by nvcc Build cuda_test")
    compile_, link = [line for line in machine.log.read_text().splitlines() if "schema" not in line]
    assert "code=sm_80 -gencode arch=compute_90,code=sm_90" in compile_
    assert "code=sm_120 -gencode arch=compute_120,code=compute_120" in compile_
    assert "-cudart static" in link
    assert (machine.target / "_deform_attn_cuda.so").exists()


def test_cuda_for_the_gpus_that_are_there(machine, torch_with_cuda, monkeypatch):
    machine(nvcc=NVCC, nvidia_smi="#!/bin/sh\nprintf '12.0\\n9.0\\n9.0\\n'\n")
    assert build_cuda(machine.target).text.startswith("for 9.0, 12.0+PTX,")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;8.6 9.0a+PTX")
    assert build_cuda(machine.target).text.startswith("for 8.0, 8.6, 9.0a+PTX,")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert "not Hopper" in build_cuda(machine.target).text


def test_cuda_needs_a_torch_with_cuda(machine, monkeypatch, tmp_path):
    machine(nvcc=NVCC)
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(build, "_find_torch", lambda: build._Torch(tmp_path, "2.13.0+cpu", False))
    assert build_cuda(machine.target).state == "left out"


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
        assert (tmp_path / "built/dino/layers/ops/csrc/deform_attn.cpp").exists()
        assert not list(tmp_path.rglob("*.so"))
