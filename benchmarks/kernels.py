"""Times of the attention operator on a GPU: `python benchmarks/kernels.py --output FILE.json`.

    python benchmarks/kernels.py --output F --cases 'encoder batch 2 float32' --original ../Deformable-DETR
    python benchmarks/kernels.py --output F --trace      kernel by kernel, by the profiler
    python benchmarks/kernels.py --once                  run each pass once, for a profiler that starts this program
    python benchmarks/kernels.py --list                  name the cases and stop

Events stand around the operator alone: forward, or the operator of its backward. Before each measured call the GPU
waits until the host has queued all of it, and the inputs are written anew in the order in which a network makes them,
so that the second-level cache holds what it would hold there. Every repeat runs each contender once; medians are over
repeats. Errors are the largest difference to the reference in float64, over the largest magnitude.

contenders: `reference` (plain PyTorch), `compiled` and, with --original and --triton, `original` and `triton` take
locations and weights; `fused` takes offsets and logits as the module does, and does more. The original has no half
types: there its time has the casts that its programs do.
"""

import argparse
import contextlib
import functools
import importlib
import json
import re
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.profiler import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import deform_attn  # noqa: E402
import original  # noqa: E402
from deform_attn import Case, make_inputs  # noqa: E402
from measure import clock, origin, peak_memory  # noqa: E402

from dino.layers import deform_attn_reference  # noqa: E402
from dino.layers.ops import (  # noqa: E402
    build,
    operator,
)

ARGUMENTS = ("value", "locations", "weights")
RAW = ("value", "offsets", "logits", "reference")
BOUNDS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
CASES = [
    Case(name, queries, batch, dtype)
    for name, queries in (("encoder", deform_attn.TOKENS), ("decoder 900", 900), ("decoder 1100", 1100))
    for batch in (2, 1, 8)
    for dtype in ("float32", "bfloat16", "float16")
]
PROVEN = (
    "compiled",
    "fused",
    "original",
)  # contenders whose numbers must be right; of others the error is only reported
PAUSE = 2_000_000  # clock ticks that the GPU waits, about 1 ms
REPEATS_OF_TRACE = 5


class Contender(NamedTuple):
    """One form of the operator, with what it takes."""

    arguments: tuple[str, ...]  # names of its inputs, in order
    forward: Callable  # inputs -> output (B, Q, M*D)
    backward: Callable  # inputs -> a function that maps the output's gradient to those of all inputs


def own(form, arguments):
    """The compiled operators called `form`; without the gradient of the reference, as DINO calls them."""
    forward, backward = (getattr(torch.ops.dino, f"{form}_{name}") for name in ("forward", "backward"))
    wanted = (False,) if arguments == RAW else ()
    return Contender(
        arguments,
        lambda value, *others: forward(value, deform_attn.FLAT, *others),
        lambda value, *others: lambda grad: backward(grad, value, deform_attn.FLAT, *others, *wanted),
    )


def by_autograd(function):
    """A function of value, locations and weights whose backward pass is that of its graph, made beforehand."""

    def backward(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
        return lambda grad: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    return Contender(ARGUMENTS, function, backward)


def original_contender(folder, device):
    """The original kernels; other types than float32 are cast there and back, as the programs that use it do."""
    sizes = torch.tensor(deform_attn.SHAPES, device=device)
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    kernels = original.Original(original.build(folder, device), sizes, starts)

    def forward(*inputs):
        return kernels.forward(*(x.float() for x in inputs)).to(inputs[0].dtype)

    def backward(*inputs):
        wide = [x.float() for x in inputs]  # kept by its forward pass
        types_ = [x.dtype for x in inputs]
        return lambda grad: [x.to(t) for x, t in zip(kernels.backward(grad.float(), *wide), types_, strict=True)]

    return Contender(ARGUMENTS, forward, backward)


def triton_contender(folder, device):
    """The kernel of a checkout of msda-triton; its package is not installed, so that its version is not asked for."""
    package = types.ModuleType("msda_triton")
    package.__path__ = [str(Path(folder) / "src/msda_triton")]
    sys.modules["msda_triton"] = package
    function = importlib.import_module("msda_triton.frontend").triton_multiscale_deformable_attention
    shapes = torch.tensor(deform_attn.SHAPES, device=device)
    return by_autograd(lambda value, *others: function(value, shapes, *others, "zeros", False).flatten(2))


def make_contenders(options, device):
    """name -> contender; those that --contenders leaves out are not made."""
    makers = {
        "compiled": lambda: own("deform_attn", ARGUMENTS),
        "fused": lambda: own("deform_attn_fused", RAW),
        "reference": lambda: by_autograd(
            lambda value, *others: deform_attn_reference(value, deform_attn.SHAPES, *others)
        ),
    }
    if options.original:
        makers["original"] = lambda: original_contender(options.original, device)
    if options.triton:
        makers["triton"] = lambda: triton_contender(options.triton, device)
    return {name: make() for name, make in makers.items() if re.fullmatch(options.contenders, name)}


def takes(name, case):
    """Whether a contender can do a case at all."""
    return name != "triton" or case.dtype != "bfloat16"


class Work(NamedTuple):
    """One pass of one contender on one case: `refresh` brings the caches into the state of a network, `run` works."""

    refresh: Callable
    run: Callable


def works_of(contender, inputs):
    """pass -> Work; the inputs are the contender's own copies."""
    tensors, grad = [getattr(inputs, name).clone() for name in contender.arguments], inputs.grad.clone()
    backward = contender.backward(*tensors)

    def forward():
        with torch.no_grad():
            return [contender.forward(*tensors)]

    return {
        "forward": Work(functools.partial(write_again, tensors, inputs, contender.arguments), forward),
        "backward": Work(functools.partial(write_again, [grad], inputs, ["grad"]), lambda: backward(grad)),
    }


@torch.no_grad()
def write_again(tensors, inputs, names):
    for x, name in zip(tensors, names, strict=True):
        x.data.copy_(getattr(inputs, name))  # past autograd's count of versions: the numbers stay the same


def timed(work, device):
    """Seconds of one run: a function to be called once the device has done everything."""
    if device.type != "cuda":
        work.refresh()
        begin = clock(device)[0]
        work.run()
        seconds = clock(device)[0] - begin
        return lambda: seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE)
    work.refresh()
    start.record()
    work.run()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def repeat(works, repeats, device):
    """key -> seconds of each repeat; the device is waited for after each round of all works, to free memory."""
    times = {key: [] for key in works}
    for _ in range(repeats):
        round_ = {key: timed(work, device) for key, work in works.items()}
        clock(device)
        for key, seconds in round_.items():
            times[key].append(seconds())
    return times


def errors_of(contender, works, oracle):
    """Of the output and of each gradient that is not cut at the borders of cells, where rounding may put a sample."""
    results = [*works["forward"].run(), *works["backward"].run()]
    pairs = zip(("output", *contender.arguments), results, oracle, strict=True)
    compared = {name: (x, y) for name, x, y in pairs if name not in ("offsets", "reference")}
    return {name: ((x.double() - y).abs().max() / y.abs().max()).item() for name, (x, y) in compared.items()}


def oracle_of(inputs, arguments):
    """Output and gradients of the reference in float64, an image at a time for memory's sake."""
    images = []
    for i in range(len(inputs.value)):
        leaves = [getattr(inputs, name)[i : i + 1].double().requires_grad_() for name in arguments]
        output = deform_attn_reference(leaves[0], deform_attn.SHAPES, *places_of(arguments, leaves))
        images.append([output.detach(), *torch.autograd.grad(output, leaves, inputs.grad[i : i + 1].double())])
    return [torch.cat(parts) for parts in zip(*images, strict=True)]


def places_of(arguments, inputs):
    """Locations and weights, as the fused form makes them of offsets, logits and reference."""
    if arguments == ARGUMENTS:
        return inputs[1:]
    _, offsets, logits, reference = inputs
    sizes = offsets.new_tensor([(width, height) for height, width in deform_attn.SHAPES])
    locations = reference[:, :, None, :, None] + offsets / sizes[:, None]
    return locations, logits.softmax(-1).view(offsets.shape[:-1])


def extra_bytes(work, device):
    """Bytes at most in use beyond what is there before and after; None where unknown."""
    before, peak, results = peak_memory(work.run, device)
    return None if peak is None else peak - before - sum(x.nbytes for x in results)


def prepare(case, contenders, device):
    """{(contender, pass): Work} and its rows, with errors and memory, which also warms up."""
    inputs = make_inputs(case, device)
    oracles = {arguments: oracle_of(inputs, arguments) for arguments in {c.arguments for c in contenders.values()}}
    works, rows = {}, {}
    for name, contender in contenders.items():
        if not takes(name, case):
            continue
        passes = works_of(contender, inputs)
        errors = errors_of(contender, passes, oracles[contender.arguments])
        for kind, work in passes.items():
            works[name, kind] = work
            rows[name, kind] = {**case._asdict(), "contender": name, "pass": kind, "errors": errors}
            rows[name, kind]["extra_bytes"] = extra_bytes(work, device)
    return works, rows


def wrong(row):
    """The quantities of a row that are too far from the reference, and must not be."""
    if row["contender"] not in PROVEN:
        return {}
    bound = BOUNDS[row["dtype"]]
    return {name: error for name, error in row["errors"].items() if not error <= bound}


def measure(case, contenders, repeats, device):
    """Rows with seconds, by events."""
    works, rows = prepare(case, contenders, device)
    for key, times in repeat(works, repeats, device).items():
        ordered = sorted(times)
        rows[key] |= {"seconds": statistics.median(times), "best_seconds": ordered[0], "repeats": len(times)}
        rows[key]["spread"] = ordered[-len(ordered) // 10] / ordered[0]  # of the slowest tenth to the best
    return list(rows.values())


def kernels_of(events):
    """name -> seconds of each run of what ran on the device."""
    found = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found.setdefault(short(event.name), []).append(event.time_range.elapsed_us() / 1e6)
    return found


def short(name):
    """A kernel's name without namespaces, return type and arguments; its template's arguments stay, if they are few."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\bdino::|\bat::native::", "", name)
    name = re.sub(r"\((?!anonymous).*$", "", name)
    return name if len(name) <= 90 else name[:87] + "..."


def trace(case, contenders, device):
    """Rows with the kernels of each pass, by the profiler."""
    works, rows = prepare(case, contenders, device)
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    for key, work in works.items():
        runs = []
        for _ in range(REPEATS_OF_TRACE):
            work.refresh()
            clock(device)
            with profile(activities=activities) as profiler:
                work.run()
                clock(device)
            runs.append(kernels_of(profiler.events()))
        rows[key]["kernels"] = medians(runs)
    return list(rows.values())


def medians(runs):
    """A row for each kernel of several runs, in order of first start: its launches, and the seconds of all of them."""
    found = []
    for name in runs[-1]:
        sums = [sum(run[name]) for run in runs if name in run]
        found.append({"kernel": name, "launches": len(runs[-1][name]), "seconds": statistics.median(sums)})
    return found


def once(case, contenders, device):
    """Each pass once, between the marks that a profiler waits for."""
    works, _ = prepare(case, contenders, device)
    for (name, kind), work in works.items():
        work.refresh()
        clock(device)
        with torch.cuda.nvtx.range(f"{case} {name} {kind}") if device.type == "cuda" else contextlib.nullcontext():
            if device.type == "cuda":
                torch.cuda.profiler.start()
            work.run()
            clock(device)
            if device.type == "cuda":
                torch.cuda.profiler.stop()


def say(rows):
    """A line for each row."""
    for row in rows:
        head = f"{Case(row['name'], row['queries'], row['batch'], row['dtype'])} {row['contender']} {row['pass']}"
        if "kernels" in row:
            total = sum(kernel["seconds"] for kernel in row["kernels"])
            print(f"{head}: {1e6 * total:.1f} us in {sum(k['launches'] for k in row['kernels'])} kernels")
            for kernel in row["kernels"]:
                print(f"    {1e6 * kernel['seconds']:8.1f} us  {kernel['launches']} x {kernel['kernel']}")
        else:
            print(f"{head}: {1e6 * row['seconds']:.1f} us, best {1e6 * row['best_seconds']:.1f}", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--device", default="cuda", help="cuda; cpu tries the program")
    parser.add_argument("--cases", default="", help="regular expression, such as 'encoder batch 2 float32'")
    parser.add_argument("--contenders", default=".*", help="regular expression of whole names: 'compiled|fused'")
    parser.add_argument("--repeats", default=40, type=int)
    parser.add_argument("--original", help="checkout of Deformable DETR, the official DINO or detrex")
    parser.add_argument("--triton", help="checkout of msda-triton")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--trace", action="store_true", help="kernel by kernel, by the profiler")
    way.add_argument("--once", action="store_true", help="run each pass once, for another profiler")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser.parse_args()


def main():
    options = parse_arguments()
    cases = [case for case in CASES if re.search(options.cases, str(case))]
    if not cases:
        sys.exit(f"no case fits {options.cases!r}")
    if options.list:
        print(f"{len(cases)} cases: {', '.join(map(str, cases))}")
        return
    device = torch.device(options.device)
    verdict = operator.verdict(device)
    if not verdict.usable:
        sys.exit(f"nothing to measure on {device}: {verdict.reason}")
    run_all(cases, options, device)


def run_all(cases, options, device):
    """Measure, and write the results after each case. Ends with status 1 if a contender's numbers are wrong."""
    contenders = make_contenders(options, device)
    report = {**origin(device), "build": build.read_record(device.type, operator.FOLDER), "rows": []}
    bad = []
    for case in cases:
        if options.once:
            once(case, contenders, device)
            continue
        found = trace(case, contenders, device) if options.trace else measure(case, contenders, options.repeats, device)
        report["rows"] += found
        say(found)
        bad += [f"{case} {row['contender']}: {wrong(row)}" for row in found if row["pass"] == "forward" and wrong(row)]
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    if bad:
        sys.exit("\n".join(["wrong numbers:", *bad]))


if __name__ == "__main__":
    main()
