"""Time, memory and error of the attention operator on a CPU: `python benchmarks/deform_attn.py --results FOLDER`.

Every round runs each contender, forward and then forward and backward, so that a disturbance of the machine meets
all of them; medians are over rounds. A call that is not measured comes before each measured one, so that the caches
hold what this contender's own work leaves there: in a network, the values were projected a moment ago. `seconds` is
the time on the wall, `cpu_seconds` what the process used: with one thread, the ratio of these holds on a busy machine,
too. Memory is what the process needs at most beyond inputs, output and gradients. Errors are the largest difference to
the reference in float64, over the largest magnitude.

contenders: `reference` and `compiled` take locations and weights; `fused` takes offsets and logits, as the module calls
it, and so does more. kernels.py measures the operator on a GPU.
"""

import argparse
import functools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import clock, origin, peak_memory  # noqa: E402

from dino.layers import deform_attn_reference  # noqa: E402
from dino.layers.ops import (  # noqa: E402
    build,
    operator,
)

SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]
FLAT = [size for shape in SHAPES for size in shape]
TOKENS = sum(h * w for h, w in SHAPES)
HEADS, DIM, POINTS = 8, 32, 4
CPU = torch.device("cpu")
OFFSET = 3.0  # standard deviation, in cells
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Case(NamedTuple):
    name: str
    queries: int
    batch: int
    dtype: str

    def __str__(self):
        return f"{self.name} batch {self.batch} {self.dtype}"


CASES = [
    Case(name, queries, batch, dtype)
    for batch in (1, 2)
    for name, queries in (("encoder", TOKENS), ("decoder 900", 900), ("decoder 1100", 1100))
    for dtype in DTYPES
]


def centres():
    """(S, 2): the centre of every cell, as a fraction of its level."""
    cells = []
    for height, width in SHAPES:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        cells.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(cells)


class Inputs(NamedTuple):
    value: torch.Tensor
    offsets: torch.Tensor
    logits: torch.Tensor
    reference: torch.Tensor
    locations: torch.Tensor
    weights: torch.Tensor
    grad: torch.Tensor


def make_inputs(case, device):
    """Encoder queries look around their own cell, decoder queries around random locations; none on a border."""
    torch.manual_seed(0)
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    dtype, levels, sizes = DTYPES[case.dtype], len(SHAPES), torch.tensor([(w, h) for h, w in SHAPES])
    points = centres() if case.queries == TOKENS else torch.rand(case.queries, 2)
    reference = points[None, :, None].expand(case.batch, -1, levels, -1).to(wide)
    offsets = torch.randn(case.batch, case.queries, HEADS, levels, POINTS, 2, dtype=wide) * OFFSET
    cells = reference[:, :, None, :, None] * sizes[:, None] + offsets - 0.5
    cells = cells.floor() + (cells - cells.floor()).clamp(0.02, 0.98)
    logits = torch.randn(case.batch, case.queries, HEADS, levels * POINTS)
    inputs = Inputs(
        torch.randn(case.batch, TOKENS, HEADS, DIM).to(dtype),
        offsets.to(dtype),
        logits.to(dtype),
        reference,
        ((cells + 0.5) / sizes[:, None]).to(wide),
        logits.softmax(-1).to(dtype).view(offsets.shape[:-1]),
        torch.randn(case.batch, case.queries, HEADS * DIM).to(dtype),
    )
    return Inputs(*(x.to(device) for x in inputs))


def contenders():
    """name -> (function, names of its differentiable inputs)"""
    arguments = ("value", "locations", "weights")
    forward, fused = torch.ops.dino.deform_attn_forward, torch.ops.dino.deform_attn_fused_forward
    return {
        "reference": (lambda v, p, w: deform_attn_reference(v, SHAPES, p, w), arguments),
        "compiled": (lambda v, p, w: forward(v, FLAT, p, w), arguments),
        "fused": (lambda v, *rest: fused(v, FLAT, *rest), ("value", "offsets", "logits", "reference")),
    }


def leaves_of(inputs, names):
    return [getattr(inputs, name).detach().requires_grad_() for name in names]


def forward_of(function, inputs, names):
    with torch.no_grad():
        return [function(*leaves_of(inputs, names))]


def both_of(function, inputs, names):
    leaves = leaves_of(inputs, names)
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.grad)]


PASSES = {"forward": forward_of, "forward+backward": both_of}


def extra_memory(run):
    """Bytes at most in use beyond what is there before and after `run`; None where unknown."""
    before, peak, results = peak_memory(run, CPU)
    return None if peak is None else peak - before - sum(x.nbytes for x in results)


def errors_of(results, inputs, names, oracle):
    """Of the output and of each gradient."""
    if "locations" not in names:  # the fused form has other inputs: tests compare it
        return {}
    pairs = zip(("output", *names), results, oracle, strict=True)
    return {name: ((x.double() - y).abs().max() / y.abs().max()).item() for name, x, y in pairs}


def measure(case, rounds):
    """One row for each contender and pass."""
    inputs = make_inputs(case, CPU)
    names = ("value", "locations", "weights")
    wide = Inputs(*(x.double() for x in inputs))
    oracle = both_of(lambda v, p, w: deform_attn_reference(v, SHAPES, p, w), wide, names)
    del wide
    rows = {}
    for name, (function, arguments) in contenders().items():
        for kind, run in PASSES.items():
            memory = extra_memory(lambda f=function, a=arguments, r=run: r(f, inputs, a))  # also warms up
            rows[name, kind] = {**case._asdict(), "contender": name, "pass": kind, "extra_bytes": memory, "times": []}
        results = both_of(function, inputs, arguments)
        rows[name, "forward+backward"]["errors"] = errors_of(results, inputs, arguments, oracle)
        del results
    del oracle
    everyone = contenders()
    for _ in range(rounds):
        for (name, kind), row in rows.items():
            run = functools.partial(PASSES[kind], everyone[name][0], inputs, everyone[name][1])
            run()
            start = clock(CPU)
            run()
            row["times"].append([end - begin for begin, end in zip(start, clock(CPU), strict=True)])
    for row in rows.values():
        wall, cpu = zip(*row.pop("times"), strict=True)
        row |= {"seconds": statistics.median(wall), "best_seconds": min(wall), "cpu_seconds": statistics.median(cpu)}
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path, help="folder of the JSON file")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--cases", default="", help="regular expression, such as 'encoder batch 1 float32'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    verdict = operator.verdict(CPU)
    if not verdict.usable:
        sys.exit(f"nothing to measure: {verdict.reason}")
    report = {
        **origin(CPU),
        "build": build.read_record(CPU.type, operator.FOLDER),
        "kernels": operator.cpu_kernels(),
        "rounds": options.rounds,
        "rows": [],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"deform_attn_cpu_{options.threads}threads.json"
    for case in CASES:
        if re.search(options.cases, str(case)):
            report["rows"] += measure(case, options.rounds)
            path.write_text(json.dumps(report, indent=1) + "\n")
            shown = {
                (r["contender"], r["pass"]): f"{1e3 * r['seconds']:.2f} ms"
                for r in report["rows"][-8:]
                if Case(r["name"], r["queries"], r["batch"], r["dtype"]) == case
            }
            print(case, shown, flush=True)


if __name__ == "__main__":
    main()
