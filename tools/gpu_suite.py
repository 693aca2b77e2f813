"""Build, test and measure the CUDA operator and the network on a machine with a CUDA GPU and nvcc.

    bash tools/gpu_suite.sh RESULTS                                 all steps, the most valuable first
    bash tools/gpu_suite.sh RESULTS --skip-done --budget 570        the steps that fit 9.5 minutes; repeat to continue
    bash tools/gpu_suite.sh RESULTS --only build,operator,kernels   some steps
    bash tools/gpu_suite.sh RESULTS --dry                           no GPU needed: check every step, run none
    bash tools/gpu_suite.sh RESULTS --list                          name the steps

Installs nothing and needs no network: only this Python's torch, numpy, scipy, pytest, hypothesis and safetensors, and
torchvision for the whole network. RESULTS gets NAME.json for each step (state, command, hardware, versions, commit),
its output NAME.log and its measurements data/NAME.json; summary.txt and report.md cover all steps.

variables, all of them optional:
    DINO_GOLDEN=FOLDER    golden arrays (a failure if there are none)
    DINO_ORIGINAL=FOLDER  checkout of Deformable DETR, whose kernels are built and measured beside ours. Else those of
                          DINO_OFFICIAL or DINO_DETREX, which are the same
    DINO_TRITON=FOLDER    checkout of msda-triton, measured likewise
    DINO_OFFICIAL=FOLDER  checkout of the official program, for the benchmark of the whole model
    DINO_DETREX=FOLDER    checkout of detrex, likewise; needs Detectron2
    DINO_COMMIT=NAME      the commit of a copy of the sources that comes without its repository

Ends with status 1 if a step failed or reached its limit. The other steps run nevertheless, unless the GPU or the build
is missing.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CALL = 600  # seconds that a machine allows one command
CHECK_LIMIT = 300  # seconds of what --dry runs for a step
SHORTEST = 20  # seconds: with less left of the budget no step starts
VARIABLES = ("DINO_GOLDEN", "DINO_ORIGINAL", "DINO_TRITON", "DINO_OFFICIAL", "DINO_DETREX")
SOURCES = ("dino/**/*.py", "dino/**/csrc/*", "benchmarks/*.py", "benchmarks/*.cu", "tests/**/*.py", "tools/gpu_suite.*")
PASSED, FAILED, CUT, SKIPPED, LEFT = "passed", "failed", "cut off", "skipped", "left"
BAD = (FAILED, CUT)


class Step(NamedTuple):
    """One thing to do on the GPU."""

    name: str
    what: str
    estimate: int  # seconds on an H100 with 16 cores
    limit: int  # seconds after which it is cut off
    command: tuple[str, ...]
    check: tuple[str, ...]  # the command of --dry
    needs: tuple[Callable, ...] = ()  # functions that say why it can't run: (state, reason) or None
    says: str = ""  # regular expression: its output must hold this
    check_says: tuple[str, ...] = ()  # likewise of the check
    variables: tuple[tuple[str, str], ...] = ()
    vital: bool = False  # whether nothing can run where it fails


# ---- needs ---------------------------------------------------------------------------------------------------------


def module(name: str) -> Callable:
    def missing():
        return None if importlib.util.find_spec(name) else (SKIPPED, f"no {name}")

    return missing


def program(find: Callable, name: str) -> Callable:
    def missing():
        return None if find() else (SKIPPED, f"no {name}")

    return missing


def folder(variable: str, pattern: str, environment: Mapping[str, str]) -> Callable:
    """A folder named by a variable, in which a file fits the pattern."""

    def missing():
        if not (named := environment.get(variable)):
            return SKIPPED, f"{variable} is not set"
        found = any(Path(named).glob(pattern))
        return None if found else (FAILED, f"{variable}={named} holds no {pattern}")

    return missing


def sanitizer() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def ncu() -> str | None:
    beside = [Path("/usr/local/cuda/bin/ncu"), *Path("/opt/nvidia/nsight-compute").glob("*/ncu")]
    return shutil.which("ncu") or next((str(path) for path in beside if path.exists()), None)


# ---- steps ---------------------------------------------------------------------------------------------------------

SOME_PASSED = r"\b[1-9]\d* passed"  # pytest is content, too, where all tests are skipped
PYTEST = (sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfEs")
SANITIZED = "gpu and (cells or strided or long_lists or (like_the_reference and -32-))"


def tests(*arguments: str) -> dict:
    """Command and check of a selection of tests; without the options of pyproject.toml, which name a plugin."""
    return {"command": (*PYTEST, *arguments), "check": (*PYTEST, *arguments, "--collect-only"), "says": SOME_PASSED}


def benchmark(name: str, data: Path | None, *arguments: str) -> dict:
    """Command and check of a program in benchmarks/; `data` is the file of its results."""
    start = (sys.executable, f"benchmarks/{name}.py", *arguments)
    return {"command": (*start, *(("--output", str(data)) if data else ())), "check": (*start, "--list")}


def first_steps(data: Path) -> list[Step]:
    """The machine, the build, and whether the operator runs at all."""
    device = (sys.executable, "benchmarks/measure.py")
    build, importable = (
        (sys.executable, "-m", "dino.layers.ops.build"),
        (sys.executable, "-c", "import dino.layers.ops.build"),
    )
    environment = (sys.executable, "-m", "dino.cli.env")
    compiled = (("DINO_DEFORM_ATTN", "compiled"),)
    return [
        Step("device", "names the GPU and the versions", 8, 60, (*device, "--output", str(data / "device.json")),
             (*device, "--help"), vital=True),
        Step("build", "compiles the operator for this GPU", 120, 400, build, importable,
             says=r"deform_attn for cuda: (built|up to date)", vital=True),
        Step("self_test", "the operator's own test on the GPU", 15, 90, environment, environment,
             says=r"cuda:0 runs the compiled operator", check_says=("deform_attn:",), variables=compiled),
    ]  # fmt: skip


def test_files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(f"tests/layers/**/{p}.py"))


def test_steps(golden: Callable) -> list[Step]:
    kernels = test_files("test_deform_attn_cuda", "test_operator*", "test_self_test*")
    others = [file for file in test_files("test_deform_attn*") if file not in kernels]
    network = ("tests/modeling/test_transformer.py", "tests/modeling/test_dino.py")
    without = "not stand_in and not fault and not refuses and not spilled and not wide and not compiles"
    return [
        Step("operator", "tests of the operator on the GPU", 90, 400,
             **tests(*kernels, "-m", "not slow", "-k", without), check_says=("gpu", "float16", "cells", "strided")),
        Step("golden", "all golden groups on the GPU, in float32", 60, 300,
             **tests("-p", "tests.on_device", "tests/golden", "-m", "not slow"), needs=(golden, module("torchvision")),
             check_says=("golden_01", "golden_07", "golden_11")),
        Step("network", "tests of the network on the GPU", 60, 240,
             **tests("-p", "tests.on_device", *network, "-m", "not slow", "-k", "not published"),
             check_says=("test_dino",)),
        Step("operator_cpu", "the other tests of the operator", 100, 400, **tests(*others, "-m", "not slow")),
    ]  # fmt: skip


def kernel_steps(data: Path, beside: tuple[str, ...]) -> list[Step]:
    """Times of the operator; `beside` names the other kernels."""
    headline = ("--cases", "encoder batch 2 (float32|bfloat16)")
    return [
        Step("kernels", "headline: encoder, batch 2, float32 and bfloat16, by events", 50, 240,
             **benchmark("kernels", data / "kernels.json", *headline, *beside), check_says=("2 cases",)),
        Step("trace", "the same kernel by kernel, by the profiler", 50, 240,
             **benchmark("kernels", data / "trace.json", *headline, "--trace", *beside), check_says=("2 cases",)),
    ]  # fmt: skip


def more_kernel_steps(data: Path, beside: tuple[str, ...]) -> list[Step]:
    rest = ("--cases", "decoder|encoder batch [18]|float16", "--repeats", "30")
    original = beside[:2] if beside[:1] == ("--original",) else ()
    forms = ("--contenders", "compiled|fused|original")
    decoder = ("--cases", "decoder 1100 batch 2 (float32|bfloat16)", "--trace", *forms)
    return [
        Step("kernels_all", "times of all other shapes and types", 120, 400,
             **benchmark("kernels", data / "kernels_all.json", *rest, *beside)),
        Step("trace_decoder", "the decoder kernel by kernel", 25, 180,
             **benchmark("kernels", data / "trace_decoder.json", *decoder, *beside), check_says=("2 cases",)),
        Step("counters", "hardware counters by ncu: conflicts, hits, atomics, occupancy", 90, 360,
             **benchmark("counters", data / "counters.json", "--ncu", ncu() or "ncu", *original),
             needs=(program(ncu, "ncu"),)),
    ]  # fmt: skip


def sanitizer_steps(data: Path) -> list[Step]:
    """Each tensor has an allocation of its own, so that reading beyond it is seen. All kernels are watched.

    What PyTorch's kernels write must be seen, too, or initcheck would take it for unwritten.
    """
    own = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    found = sanitizer() or "compute-sanitizer"
    steps = []
    for tool, estimate in (("memcheck", 60), ("racecheck", 90), ("synccheck", 60), ("initcheck", 60)):
        selected = tests("tests/layers/ops/test_deform_attn_cuda.py", "-k", SANITIZED)
        watch = (found, "--tool", tool, "--error-exitcode", "9")
        steps.append(
            Step(tool, f"compute-sanitizer {tool} on tiled, strided and half cases", estimate, 300,
                 (*watch, *selected["command"]), selected["check"], needs=(program(sanitizer, "compute-sanitizer"),),
                 says=SOME_PASSED,
                 check_says=("cells", "strided", "float16"), variables=own)
        )  # fmt: skip
    return steps


# Each has a step of its own: PyTorch takes minutes to compile the network.
COMPILED = (
    ("inference", "compiled", "bfloat16"),
    ("training", "compiled", "bfloat16"),
    ("inference", "compiled_graphs", "bfloat16"),
    ("training", "compiled", "tf32"),
    ("inference", "compiled", "tf32"),
    ("inference", "compiled_graphs", "tf32"),
)


def model_steps(data: Path) -> list[Step]:
    """The whole network; needs torchvision's backbone."""

    def step(name, what, estimate, limit, cases, *more):
        found = benchmark("model_cuda", data / f"{name}.json", "--cases", cases, *more)
        return Step(name, what, estimate, limit, **found, needs=(module("torchvision"),))

    plain = " (dino|reference|graphs)$"
    return [
        step("inference", "the network at 800x1333, batch 1", 60, 300, f"inference batch 1 .*{plain}"),
        step("training", "its training step, batch 2", 90, 360, f"training batch 2 .*{plain}"),
        *(step(f"{contender}_{work}_{precision}", f"{work} in {precision} by torch.compile", 200, 480,
               f"{work} .*{precision} {contender.replace('_', '-')}$")
          for work, contender, precision in COMPILED),
        step("batches", "other batches: 1, 2, 8, 16", 180, 500,
             "(inference batch (2|8|16)|training batch (1|8|16)) ", "--repeats", "8"),
    ]  # fmt: skip


def other_steps(data: Path, environment: Mapping[str, str]) -> list[Step]:
    """Other programs, whole, with what they need."""
    steps = []
    for name, file, needs in (
        ("official", "models/dino/dino.py", ()),
        ("detrex", "projects/dino/configs/models/dino_r50.py", (module("detectron2"),)),
    ):
        variable = f"DINO_{name.upper()}"
        needs = (folder(variable, file, environment), module("torchvision"), *needs)
        against = ("--against", environment.get(variable, ""))
        command = (sys.executable, "benchmarks/model.py", "--device", "cuda", "--rounds", "5", "--results", str(data))
        command += ("--dtypes", "float32", "--cases", "inference|training .* batch 2|criterion")
        check = (sys.executable, "benchmarks/model.py", "--help")
        steps.append(Step(name, f"the network beside the program of {variable}", 150, 480, (*command, *against), check,
                          needs=needs))  # fmt: skip
    return steps


def all_steps(results: Path, environment: Mapping[str, str]) -> list[Step]:
    """In the order of their worth."""
    data = results / "data"
    original = next(
        (environment[v] for v in ("DINO_ORIGINAL", "DINO_OFFICIAL", "DINO_DETREX") if environment.get(v)), ""
    )
    beside = ("--original", original) if original else ()
    beside += ("--triton", environment["DINO_TRITON"]) if environment.get("DINO_TRITON") else ()
    operator, golden, network, operator_cpu = test_steps(folder("DINO_GOLDEN", "01_*.safetensors", environment))
    memcheck, racecheck, *other_checks = sanitizer_steps(data)
    inference, training, *other_models = model_steps(data)
    kernels_all, trace_decoder, counters = more_kernel_steps(data, beside)
    return [
        *first_steps(data), operator, *kernel_steps(data, beside), golden, network, inference, training, memcheck,
        racecheck, counters, trace_decoder, kernels_all, *other_checks, *other_models, operator_cpu,
        *other_steps(data, environment),
    ]  # fmt: skip


# ---- running -------------------------------------------------------------------------------------------------------


def digest_of_sources() -> str:
    """Of everything that a step may run: a commit says nothing about changes, and a copy may come without it."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        if path.suffix not in (".so", ".json", ".pyc"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def environment_of(step: Step) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "DINO_DEFORM_ATTN": "auto", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, **dict(step.variables)}


def execute(command: tuple[str, ...], limit: float, log: Path, environment: Mapping[str, str]) -> int | None:
    """The status of a command, whose output goes to the file; None where it was cut off, with all that it started."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            output.write(f"\ncut off after {limit:.0f} s\n")
            return None
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and its children, first with a chance to write something down."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def verdict(status: int | None, pattern: str, log: Path) -> tuple[str, str]:
    """(state, what to say of it) of a command that has ended."""
    if status is None:
        return CUT, last_line(log)
    if status:
        return FAILED, f"status {status}: {last_line(log)}"
    if pattern and not re.search(pattern, log.read_text(errors="replace")):
        return FAILED, f"its output does not say {pattern!r}"
    return PASSED, last_line(log)


class Suite:
    """Runs steps one after the other, and keeps a record of each in a folder.

    Args:
        results: the folder, with a folder `data` in it.
        key: sources and options; with another key nothing counts as done.
        deadline: of the clock `time.monotonic`, or None; no step runs beyond it.
    """

    def __init__(self, results: Path, *, key: Mapping, deadline: float | None):
        self.results, self.key, self.deadline = results, dict(key), deadline

    def record(self, step: Step) -> dict:
        """What the last run of a step left; empty where there was none."""
        try:
            return json.loads((self.results / f"{step.name}.json").read_text())
        except (OSError, ValueError):
            return {}

    def portable(self, text: str) -> str:
        """The text without paths of this machine."""
        paths = {str(self.results): "RESULTS", sys.executable: "python3", f"{ROOT}/": ""}
        paths |= {value: f"${name}" for name, value in self.key.items() if name.startswith("DINO_") and value}
        for path in sorted(paths, key=len, reverse=True):
            text = text.replace(path, paths[path])
        return text

    def key_of(self, step: Step) -> str:
        """What must be the same for a step that passed to count as done."""
        text = json.dumps([self.key, self.portable(shlex.join(step.command))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_done(self, step: Step) -> bool:
        before = self.record(step)
        return before.get("state") == PASSED and before.get("key") == self.key_of(step)

    def remaining(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def run(self, step: Step) -> str:
        """Run one step, or say why not; the state that it ended in."""
        if trouble := next(filter(None, (need() for need in step.needs)), None):
            return self.keep(step, *trouble, 0.0)
        if self.remaining() < max(SHORTEST, min(step.estimate, step.limit)):
            return self.keep(step, LEFT, f"needs about {step.estimate} s", 0.0)
        log, begin = self.results / f"{step.name}.log", time.monotonic()
        try:
            status = execute(step.command, min(step.limit, self.remaining()), log, environment_of(step))
            found = verdict(status, step.says, log)
        except OSError as error:
            found = FAILED, str(error)
        return self.keep(step, *found, time.monotonic() - begin)

    def keep(self, step: Step, state: str, text: str, seconds: float) -> str:
        """Write and print the record of a step; keep earlier measurements of a step that did not run."""
        if state != LEFT or not self.record(step):
            record = {"step": step.name, "what": step.what, "state": state, "text": self.portable(text)}
            record |= {
                "seconds": round(seconds, 1),
                "command": self.portable(shlex.join(step.command)),
                "limit": step.limit,
                "estimate": step.estimate,
            }
            record |= {"when": datetime.now().isoformat(timespec="seconds"), "key": self.key_of(step), **self.origin()}
            (self.results / f"{step.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{step.name}: {state}, {seconds:.0f} s: {text}", flush=True)
        return state

    def origin(self) -> dict:
        """Hardware, versions and commit, as the first step found them."""
        try:
            return {"origin": json.loads((self.results / "data/device.json").read_text())}
        except (OSError, ValueError):
            return {"origin": None}


def run_steps(steps: list[Step], suite: Suite, skip_done: bool) -> dict[str, str]:
    """name -> state of each step; the machine is looked at in any case."""
    states = {}
    for step in steps:
        if skip_done and step.name != "device" and suite.is_done(step):
            print(f"{step.name}: done before", flush=True)
            states[step.name] = PASSED
            continue
        states[step.name] = suite.run(step)
        if step.vital and states[step.name] != PASSED:
            print(f"nothing can run without {step.name}: stopped", flush=True)
            break
    return states


def summarize(steps: list[Step], suite: Suite) -> str:
    """A line for each step that has a record, of this call or an earlier one."""
    lines = []
    for step in steps:
        if record := suite.record(step):
            lines.append(f"{step.name}: {record['state']}, {record['seconds']:.0f} s: {record['text']}")
    return "\n".join(lines) + "\n"


# ---- without a GPU -------------------------------------------------------------------------------------------------


def check_step(step: Step, log: Path) -> list[str]:
    """Issues of a step that show without a GPU: by its check, and by its limit."""
    wrong = []
    if not step.estimate <= step.limit < CALL - 30:
        wrong.append(f"estimate {step.estimate} s, limit {step.limit} s: a call has {CALL} s")
    status = execute(step.check, CHECK_LIMIT, log, {**environment_of(step), "DINO_TEST_DEVICE": "cpu"})
    text = log.read_text(errors="replace")
    if status != 0:
        wrong.append(f"`{' '.join(step.check)}` ended with status {status}: {last_line(log)}")
    wrong += [f"its check does not say {pattern!r}" for pattern in step.check_says if not re.search(pattern, text)]
    return wrong


def dry_run(steps: list[Step], results: Path) -> int:
    """Check each step and say what it would do; the number of those that are broken."""
    broken = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda step: check_step(step, results / f"{step.name}.dry.log"), steps)
    for step, wrong in zip(steps, found, strict=True):
        for need in step.needs:
            if trouble := need():
                print(f"{step.name}: would be {trouble[0]} here: {trouble[1]}")
                wrong += [trouble[1]] if trouble[0] == FAILED else []
        line = f"about {step.estimate} s, at most {step.limit} s: {step.what}"
        print(f"{step.name}: {'BROKEN: ' + '; '.join(wrong) if wrong else line}", flush=True)
        broken += bool(wrong)
    for number, call in enumerate(calls_of(steps), 1):
        print(f"call {number}: about {sum(s.estimate for s in call)} s: {', '.join(s.name for s in call)}")
    total = sum(step.estimate for step in steps)
    print(f"{len(steps)} steps, about {total / 60:.0f} minutes, {broken} broken")
    return broken


def calls_of(steps: list[Step]) -> list[list[Step]]:
    """The steps in calls of at most 9.5 minutes, by their estimates."""
    calls: list[list[Step]] = [[]]
    for step in steps:
        if calls[-1] and sum(s.estimate for s in calls[-1]) + step.estimate > CALL - 30:
            calls.append([])
        calls[-1].append(step)
    return calls


# ---- command -------------------------------------------------------------------------------------------------------


def names_of(text: str, steps: list[Step]) -> set[str]:
    names = set(filter(None, text.split(",")))
    if unknown := names - {step.name for step in steps}:
        sys.exit(f"no step is called {', '.join(sorted(unknown))}; --list names them")
    return names


def choose(steps: list[Step], only: str, skip: str) -> list[Step]:
    """The steps that are asked for, in the order of their worth, and the first: all records name the machine."""
    wanted, unwanted = names_of(only, steps), names_of(skip, steps)
    wanted |= {steps[0].name} if wanted else {step.name for step in steps}
    return [step for step in steps if step.name in wanted - unwanted]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "gpu_suite.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder of the results")
    parser.add_argument("--only", default="", metavar="STEP,STEP", help="run these; their order stays")
    parser.add_argument("--skip", default="", metavar="STEP,STEP", help="leave these out")
    parser.add_argument("--skip-done", action="store_true", help="leave out what passed with the same sources")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of this call; steps that don't fit are left")
    parser.add_argument("--dry", action="store_true", help="check every step without a GPU")
    parser.add_argument("--list", action="store_true", help="name the steps")
    return parser


def absolute(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that name folders; steps run in the root of the sources."""
    return {name: str(Path(environment[name]).resolve()) for name in VARIABLES if environment.get(name)}


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    options = build_parser().parse_args(arguments)
    results = options.results.resolve()
    os.environ.update(absolute(os.environ))
    everything = all_steps(results, os.environ)
    steps = choose(everything, options.only, options.skip)
    if options.list:
        print("\n".join(f"{s.name}: about {s.estimate} s, at most {s.limit} s: {s.what}" for s in steps))
        return 0
    (results / "data").mkdir(parents=True, exist_ok=True)
    if options.dry:
        return int(dry_run(steps, results) > 0)
    key = {"sources": digest_of_sources(), "python": sys.version, **{v: os.environ.get(v) for v in VARIABLES}}
    suite = Suite(results, key=key, deadline=None if options.budget is None else begin + options.budget)
    states = run_steps(steps, suite, options.skip_done)
    (results / "summary.txt").write_text(summarize(everything, suite))
    write_report(results)
    return conclude(states, steps, time.monotonic() - begin)


def write_report(results: Path) -> None:
    """The tables of all that was found so far, by this and earlier calls."""
    command = [sys.executable, "benchmarks/report.py", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (results / "report.md").write_text(done.stdout or done.stderr)


def conclude(states: Mapping[str, str], steps: list[Step], seconds: float) -> int:
    """Say how it went; the exit status."""
    left = [step.name for step in steps if states.get(step.name, LEFT) == LEFT]
    bad = [name for name, state in states.items() if state in BAD]
    if left:
        print(f"left for another call: {', '.join(left)}")
    print(f"{'FAILED: ' + ', '.join(bad) if bad else 'nothing failed'}, {seconds:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
