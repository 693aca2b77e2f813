"""The measuring script of a GPU machine: steps chosen, continued, cut off, failed; and all of them checked here."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .programs import ROOT, load_program

suite = load_program("gpu_suite")


def step(name, code="pass", **changes):
    """A step that runs Python code."""
    command = (sys.executable, "-c", code)
    given = {"what": "does it", "estimate": 1, "limit": 60, "command": command, "check": command, **changes}
    return suite.Step(name, **given)


def suite_in(folder, deadline=None, **key):
    (folder / "data").mkdir(exist_ok=True)
    return suite.Suite(folder, key=key, deadline=deadline)


def record(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_failing_step_leaves_the_others_running(tmp_path, capsys):
    steps = [step("one", "print('found 1')"), step("two", "raise SystemExit(3)"), step("three", "print('found 3')")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/device.json").write_text('{"hardware": {"gpu": "H100"}}')
    runner = suite_in(tmp_path, sources="a")
    states = suite.run_steps(steps, runner, skip_done=False)
    assert states == {"one": "passed", "two": "failed", "three": "passed"}
    assert suite.conclude(states, steps, 1.0) == 1
    assert suite.conclude({"one": "passed", "two": "skipped", "three": "passed"}, steps, 1.0) == 0
    assert "FAILED: two" in capsys.readouterr().out
    found = record(tmp_path, "one")
    assert found["text"] == "found 1"
    assert found["origin"]["hardware"]["gpu"] == "H100"
    assert found["command"].startswith("python3 -c ")
    assert "two: failed" in suite.summarize(steps, runner)
    assert "status 3" in record(tmp_path, "two")["text"]


def test_a_vital_step_that_fails_stops_the_rest(tmp_path):
    steps = [step("device", "raise SystemExit(1)", vital=True), step("kernels")]
    states = suite.run_steps(steps, suite_in(tmp_path), skip_done=False)
    assert states == {"device": "failed"}
    assert suite.conclude(states, steps, 1.0) == 1


def test_what_is_done_is_not_done_again(tmp_path):
    """Unless its sources, its command or its options are others, or it did not pass."""
    note = tmp_path / "runs"
    code = f"open({str(note)!r}, 'a').write('x')"
    one = step("one", code)

    def runs(steps, skip_done=True, **key):
        note.write_text("")
        suite.run_steps(steps, suite_in(tmp_path, **key), skip_done)
        return len(note.read_text())

    assert runs([one], sources="a") == 1
    assert runs([one], sources="a") == 0
    assert runs([one], skip_done=False, sources="a") == 1
    assert runs([one], sources="b") == 1
    assert runs([step("one", code + ";1")], sources="b") == 1
    failing = step("one", code + ";raise SystemExit(1)")
    assert runs([failing], sources="b") == 1
    assert runs([failing], sources="b") == 1


def test_a_step_is_cut_off_with_all_that_it_started(tmp_path):
    note = tmp_path / "child"
    code = f"""import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open({str(note)!r}, 'w').write(str(child.pid))
print('partly done', flush=True)
time.sleep(60)"""
    states = suite.run_steps([step("slow", code, limit=4), step("next")], suite_in(tmp_path), skip_done=False)
    assert states == {"slow": "cut off", "next": "passed"}
    assert suite.conclude(states, [], 1.0) == 1
    log = (tmp_path / "slow.log").read_text()
    assert "partly done" in log
    assert "cut off after 4 s" in log
    time.sleep(0.2)
    command = Path(f"/proc/{note.read_text()}/cmdline")  # empty for a process that has ended and is not yet buried
    assert not command.exists() or not command.read_bytes()


def test_the_budget_of_a_call(tmp_path, capsys):
    """A step that does not fit is left for another call, and so is not failed."""
    steps = [step("short", estimate=1), step("long", estimate=500, limit=520)]
    states = suite.run_steps(steps, suite_in(tmp_path, deadline=time.monotonic() + 100), skip_done=False)
    assert states == {"short": "passed", "long": "left"}
    assert suite.conclude(states, steps, 1.0) == 0
    assert "left for another call: long" in capsys.readouterr().out


def test_needs(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    for path in (empty, full):
        path.mkdir()
    (full / "01_a.safetensors").touch()

    def state(**environment):
        need = suite.folder("DINO_GOLDEN", "01_*.safetensors", environment)
        return suite.run_steps([step("golden", needs=(need,))], suite_in(tmp_path), skip_done=False)["golden"]

    assert state() == "skipped"
    assert state(DINO_GOLDEN=str(empty)) == "failed"
    assert state(DINO_GOLDEN=str(full)) == "passed"
    assert "holds no" in suite.folder("DINO_GOLDEN", "01_*", {"DINO_GOLDEN": str(empty)})()[1]
    assert suite.module("torch")() is None
    assert suite.module("no_such_module")() == ("skipped", "no no_such_module")
    assert suite.program(lambda: None, "ncu")() == ("skipped", "no ncu")


def test_tests_that_are_all_skipped_are_a_failure(tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.skip\ndef test_it(): pass\n")
    given = suite.tests(str(tmp_path / "test_it.py"))
    steps = [suite.Step("tests", "", 1, 60, **given)]
    assert suite.run_steps(steps, suite_in(tmp_path), skip_done=False) == {"tests": "failed"}
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    assert suite.run_steps(steps, suite_in(tmp_path), skip_done=False) == {"tests": "passed"}


def test_folders_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert suite.absolute({"DINO_GOLDEN": "golden", "DINO_TRITON": ""}) == {"DINO_GOLDEN": str(tmp_path / "golden")}


def test_records_do_not_name_places_of_the_machine(tmp_path):
    code = f"print('{ROOT}/tests/test_it.py in {tmp_path}, /checkout/of/another'); raise SystemExit(1)"
    runner = suite_in(tmp_path, DINO_TRITON="/checkout/of/another")
    suite.run_steps([step("one", code)], runner, skip_done=False)
    found = record(tmp_path, "one")
    assert found["text"] == "status 1: tests/test_it.py in RESULTS, $DINO_TRITON"
    assert not {sys.executable, str(ROOT), str(tmp_path)} & set(re.findall(r"/[\w/.-]+", found["command"]))


def test_output_must_say_what_it_should(tmp_path):
    steps = [step("one", "print('cuda:0 runs plain PyTorch')", says="runs the compiled operator")]
    assert suite.run_steps(steps, suite_in(tmp_path), skip_done=False) == {"one": "failed"}


def test_choice():
    steps = suite.all_steps(Path("RESULTS"), {})
    names = [s.name for s in suite.choose(steps, "kernels,build", "")]
    assert names == ["device", "build", "kernels"]
    assert "golden" not in [s.name for s in suite.choose(steps, "", "golden")]
    with pytest.raises(SystemExit, match="no step is called kernel;"):
        suite.choose(steps, "kernel", "")


def test_every_step_fits_a_call():
    steps = suite.all_steps(Path("RESULTS"), {})
    assert [s.name for s in steps[:3]] == ["device", "build", "self_test"]
    assert len({s.name for s in steps}) == len(steps)
    assert all(s.estimate <= s.limit < 540 for s in steps)
    calls = suite.calls_of(steps)
    assert [s for call in calls for s in call] == steps
    assert max(sum(s.estimate for s in call) for call in calls) <= 570


def test_other_programs_reach_the_commands():
    variables = {"DINO_OFFICIAL": "/o", "DINO_TRITON": "/t"}
    (kernels,) = [s for s in suite.all_steps(Path("RESULTS"), variables) if s.name == "kernels"]
    assert kernels.command[-6:] == ("--original", "/o", "--triton", "/t", "--output", "RESULTS/data/kernels.json")
    (kernels,) = [
        s for s in suite.all_steps(Path("RESULTS"), variables | {"DINO_ORIGINAL": "/d"}) if s.name == "kernels"
    ]
    assert "/d" in kernels.command


def test_the_check_of_steps_finds_faults(tmp_path, capsys):
    steps = [
        step("good", check_says=("3",), check=(sys.executable, "-c", "print(3)")),
        step("no such file", check=(sys.executable, "no_such_file.py")),
        step("says too little", check_says=("cells",)),
        step("too long", limit=580),
    ]
    assert suite.dry_run(steps, tmp_path) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "good: about 1 s, at most 60 s: does it"
    assert "status 2" in lines[1]
    assert "does not say 'cells'" in lines[2]
    assert "a call has 600 s" in lines[3]
    assert lines[-1] == "4 steps, about 0 minutes, 3 broken"


def test_the_shell_starts_the_program(tmp_path):
    command = ["bash", "tools/gpu_suite.sh", str(tmp_path), "--list", "--only", "kernels"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["device", "kernels"], done.stderr
    assert not (tmp_path / "data").exists()


def dry(python, folder, **variables):
    """What `--dry` says of all steps, run by another Python."""
    command = [str(python), "tools/gpu_suite.py", str(folder), "--dry"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_step_is_whole(tmp_path):
    """All tests and programs that the steps name are there and start."""
    done = dry(sys.executable, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


# What a bare GPU machine has, and nothing else: no Detectron2, no pycocotools, no plugin of pytest.
BARE = (
    *(
        "torch==2.11.0",
        "torchvision==0.26.0",
        "numpy",
        "scipy",
        "pytest",
        "hypothesis",
        "timm",
        "safetensors",
        "matplotlib",
    ),
    *("jinja2", "tqdm", "opencv-python-headless", "onnx", "onnxruntime", "ninja", "pillow"),
)


BUILD = """
import pathlib, sys
from dino import build
from dino.layers import operator
operator.FOLDER = pathlib.Path(sys.argv[1])
print(*build.build(operator.FOLDER), sep="\\n")
operator.load("cuda")
"""


def bare_python(folder):
    """A Python with the packages of a bare GPU machine: one that DINO_BARE_PYTHON names, or a new one. Or skips."""
    if named := os.environ.get("DINO_BARE_PYTHON"):
        return named
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--no-compile", *BARE]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the packages can't be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin/python"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_on_a_bare_machine(tmp_path):
    """Build for a GPU, loading of what was built, and the check of every step, with these packages and no others."""
    python = bare_python(tmp_path / "bare")
    environment = {"PYTHONPATH": str(ROOT), "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    if shutil.which("nvcc"):
        built = subprocess.run(
            [python, "-c", BUILD, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert "deform_attn for cuda: built: for 9.0" in built.stdout, built.stdout + built.stderr
        assert built.returncode == 0, built.stderr
    done = dry(python, tmp_path / "results", PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
