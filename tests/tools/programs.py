"""Starts the programs of `tools/`, here or in a process of their own, and loads them as modules."""

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]


def load_program(name, folder="tools"):
    """The module in `tools/<name>.py`, or in another folder that is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / folder))  # of its neighbours, as Python itself does
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / folder))
    return module


def run_here(name, *arguments):
    """Run it in this process and folder, as `python tools/<name>.py` would: without the seconds of a start."""
    words = [str(ROOT / f"tools/{name}.py"), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):  # a message, which Python prints
                print(code, file=err)
                code = 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_program(name, *arguments, folder):
    """Run it in `folder`, on the CPU with one thread."""
    return run_python(str(ROOT / f"tools/{name}.py"), *arguments, folder=folder)


def run_verb(*arguments, folder, **variables):
    """Run `dino` with these arguments, as `run_program` does, with further variables in its environment."""
    return run_python("-m", "dino", *arguments, folder=folder, **variables)


def run_python(*arguments, folder, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.update(variables)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def assert_one_error(result, message, code=1):
    """This exit code, one line of explanation as the last thing said, and no traceback."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    assert message in errors[0]


def contents(folder):
    """Every file of a folder, to see that nothing in it changed."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
