"""Time, memory and launches of the whole network on a GPU: `python benchmarks/model_cuda.py --output FILE.json`.

    python benchmarks/model_cuda.py --output F --cases 'training batch 2'
    python benchmarks/model_cuda.py --list         name the cases and stop

R50, 4 scales, images of 800 x 1333 pixels, random weights. All cases run in one process, one after the other, each
with a network of its own. A training step is that of a recipe: losses and their gradients, clipping, fused AdamW.

contenders: `dino` is this project's network, `compiled` the same by `torch.compile`, `graphs` replays CUDA graphs, and
`compiled-graphs` does both; `reference` is the same network with the attention in plain PyTorch.

precisions: `float32` without TensorFloat-32, `tf32` with it, and `bfloat16`: autocast with float32 weights, but a cast
network for inference, as the predictor does; what stays in float32 there may use TensorFloat-32.

`seconds` is the median of single steps, each waited for; `seconds_in_a_row` is that of steps that are not waited for;
`host_seconds` how long the host was busy with one of those before it was free for the next. `busy_seconds` is what the
GPU's kernels take together, from one step under the profiler, with their number, the launches and the host's waits.
"""

import argparse
import contextlib
import gc
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.profiler import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import model  # noqa: E402
from kernels import kernels_of  # noqa: E402
from measure import MIB, clock, origin, peak_memory  # noqa: E402

from dino.layers import deform_attn_implementation  # noqa: E402
from dino.modeling import CudaGraphs, compile_network, use_float32_precision  # noqa: E402

HEIGHT, WIDTH, BOXES = 800, 1333, 10
LAUNCH = re.compile(r"^cu(da)?(LaunchKernel|GraphLaunch)")
TOP = 25  # kernels that are named


class Case(NamedTuple):
    work: str  # inference or training
    batch: int
    precision: str  # float32, tf32 or bfloat16
    contender: str  # reference, dino, graphs, compiled or compiled-graphs

    def __str__(self):
        return f"{self.work} batch {self.batch} {self.precision} {self.contender}"


CASES = [
    *(
        Case(work, batch, precision, contender)
        for work, batch in (("inference", 1), ("training", 2))
        for precision, contender in (
            ("float32", "reference"),
            ("float32", "dino"),
            ("tf32", "dino"),
            ("bfloat16", "dino"),
            ("bfloat16", "reference"),
        )
    ),
    *(Case(work, 2, precision, "compiled") for work in ("training",) for precision in ("tf32", "bfloat16")),
    *(
        Case("inference", 1, precision, contender)
        for contender in ("graphs", "compiled", "compiled-graphs")
        for precision in ("tf32", "bfloat16")
    ),
    *(
        Case(work, batch, precision, "dino")
        for batch in (1, 2, 8, 16)
        for work in ("inference", "training")
        for precision in ("tf32", "bfloat16")
        if (work, batch) not in (("inference", 1), ("training", 2))
    ),
    Case("training", 8, "float32", "reference"),
    Case("training", 8, "float32", "dino"),
]


@contextlib.contextmanager
def settings_of(case):
    """TensorFloat-32 and the implementation of the attention for a block of code."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    use_float32_precision("highest" if case.precision == "float32" else "high")
    try:
        with deform_attn_implementation("reference" if case.contender == "reference" else "compiled"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def as_of_model(case):
    """The case in the words of model.py."""
    dtype = "bfloat16" if case.precision == "bfloat16" else "float32"
    boxes = BOXES if case.work == "training" else 0
    return model.Case(case.work, HEIGHT, WIDTH, case.batch, boxes, dtype)


def sped_up(contender, case):
    """The contender with what its name asks for: compiled code, CUDA graphs."""
    if "compiled" in case.contender:
        compile_network(contender.model)
    if "graphs" not in case.contender:
        return contender
    run = CudaGraphs(contender.model)

    def detect(images):
        found = run(images, torch.zeros(images[:, 0].shape, dtype=torch.bool, device=images.device)).decoder
        return found.logits[-1], found.boxes[-1]

    return contender._replace(detect=detect)


def step_of(case, device):
    """(the contender, a function that does one step)"""
    torch.manual_seed(0)
    contender, same = model.ours(device), as_of_model(case)
    if case.work == "inference":
        model.prepare(contender.model, same)
    contender = sped_up(contender, case)
    work = model.work_of(same, contender, device)
    if case.work == "inference":
        return contender, work
    parameters = [p for p in contender.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True)  # as in the recipes

    def step():
        loss = work()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        return loss

    return contender, step


def time_single(step, repeats, device):
    """Seconds of each of several steps that are waited for."""
    times = []
    for _ in range(repeats):
        begin = clock(device)[0]
        step()
        times.append(clock(device)[0] - begin)
    return times


def time_in_a_row(step, repeats, device):
    """(seconds of a step, seconds for which the host was busy with it), of steps that are not waited for."""
    begin = clock(device)[0]
    for _ in range(repeats):
        step()
    free = time.perf_counter()
    return (clock(device)[0] - begin) / repeats, (free - begin) / repeats


def profile_of(step, device):
    """Kernels of one step: seconds of all, their number, launches by the host, and those that take most."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        clock(device)
    events = profiler.events()
    kernels = kernels_of(events)
    launches = [e for e in events if e.device_type == DeviceType.CPU and LAUNCH.search(e.name)]
    ordered = sorted(kernels.items(), key=lambda pair: -sum(pair[1]))
    return {
        "busy_seconds": sum(map(sum, kernels.values())),
        "kernels": sum(map(len, kernels.values())),
        "launches": len(launches),
        "top": [{"kernel": name, "runs": len(all_), "seconds": sum(all_)} for name, all_ in ordered[:TOP]],
    }


def measure(case, repeats, device):
    """The row of a case."""
    with settings_of(case):
        begin = clock(device)[0]
        contender, step = step_of(case, device)
        result = step()
        row = {**case._asdict(), "first_seconds": clock(device)[0] - begin}
        if case.work == "training":
            row["loss"] = result.item()
        for _ in range(2):
            step()
        single = time_single(step, repeats, device)
        row |= {"seconds": statistics.median(single), "best_seconds": min(single)}
        row["seconds_in_a_row"], row["host_seconds"] = time_in_a_row(step, repeats, device)
        row |= profile_of(step, device)
        row["peak_bytes"] = peak_memory(step, device)[1]
        if device.type == "cuda":
            row["waits"] = model.waits(step)
        if case.contender in ("dino", "reference"):
            row["stages"] = model.shares(contender, step, device)
        return row


def attempt(case, repeats, device):
    """The row of a case, or one that says why there is none."""
    try:
        return measure(case, repeats, device)
    except torch.cuda.OutOfMemoryError:
        return {**case._asdict(), "error": "out of memory"}
    except Exception as error:  # one contender that fails must not hide the others
        return {**case._asdict(), "error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    finally:
        if "compiled" in case.contender:
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def say(case, row):
    if "error" in row:
        print(f"{case}: {row['error']}", flush=True)
        return
    times = {name: row[name] for name in ("seconds", "seconds_in_a_row", "host_seconds", "busy_seconds")}
    shown = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items())
    counts = f"{row['kernels']} kernels, {row['launches']} launches, {row.get('waits')} waits"
    print(f"{case}: {shown}, {counts}, {(row['peak_bytes'] or 0) / MIB:.0f} MiB", flush=True)
    if "stages" in row:
        print("   ", ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in row["stages"].items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--device", default="cuda", help="cuda; cpu tries the program")
    parser.add_argument("--cases", default="", help="regular expression, such as 'training batch 2'")
    parser.add_argument("--repeats", default=20, type=int)
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args()
    cases = [case for case in CASES if re.search(options.cases, str(case))]
    if not cases:
        sys.exit(f"no case fits {options.cases!r}")
    if options.list:
        print(f"{len(cases)} cases: {', '.join(map(str, cases))}")
        return
    device = torch.device(options.device)
    report = {**origin(device), "repeats": options.repeats, "image": [HEIGHT, WIDTH], "rows": []}
    for case in cases:
        report["rows"].append(attempt(case, options.repeats, device))
        say(case, report["rows"][-1])
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    failed = [row["error"] for row in report["rows"] if row.get("error", "out of memory") != "out of memory"]
    if failed:
        sys.exit(f"{len(failed)} cases failed: {failed[0]}")


if __name__ == "__main__":
    main()
