"""Costs of DINO's descendants relative to DINO: `python benchmarks/variants.py --threads 1`.

    python benchmarks/variants.py --recipes hybrid dac --rounds 3 --size 224 288
    python benchmarks/variants.py --report          only write the table again

Counted, for one image of 800x1280 with ten objects: parameters, multiply-adds, and the activations that a training step
keeps. Measured on the CPU, at a smaller size: a training step without the optimiser (network, losses, gradients), an
inference of the network, and the most memory that the process of a training holds. Every recipe has a process of its
own; each round runs all of them once, so that a disturbance of the machine meets all; ratios are medians over rounds of
processor seconds, each divided by DINO's of the same round. Weights are random.

The results go to benchmarks/results/variants_cpu_1thread.json, a table of them to docs/descendants.md.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dino.cli import report_errors  # noqa: E402  # silences warnings of Detectron2; must come before its import

import torch  # noqa: E402  # isort: skip
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from measure import Worker, clock, origin, peak_memory  # noqa: E402

from dino.inference.cpu import keep_freed_memory  # noqa: E402
from dino.layers.cpu_feed_forward import use_cpu_feed_forward  # noqa: E402
from dino.modeling import network_cost  # noqa: E402
from dino.utils.files import write_whole  # noqa: E402
from dino.utils.recipes import find_recipe  # noqa: E402

DINO = "dino_r50_4scale_12ep"
DESCENDANTS = ("varifocal", "matchability", "align_detr", "stable_dino", "hybrid", "dac", "relation_detr")
PAGE = ROOT / "docs/descendants.md"
BEGIN, END = "<!-- begin: made by benchmarks/variants.py -->", "<!-- end: made by benchmarks/variants.py -->"
FULL_SIZE = (800, 1280)
OBJECTS = 10
DEVICE = torch.device("cpu")


def recipe_of(name):
    """Name of the recipe of a descendant, or of DINO."""
    return DINO if name == "dino" else f"{DINO}_{name}"


def build(name):
    """The detector of a recipe, with random weights."""
    torch.manual_seed(0)
    return instantiate(LazyConfig.load(str(find_recipe(recipe_of(name)))).model)


def count(name, size=FULL_SIZE):
    """What can be counted without running anything."""
    network, targets = build(name).network, network_cost.some_targets(1, OBJECTS, DEVICE)
    parameters = network_cost.count_parameters(network)
    return {
        "parameters": parameters["total"][0],
        "branch_parameters": parameters["branches"][0],
        "inference_multiply_adds": network_cost.count_multiply_adds(network, 1, *size)["total"],
        "training_multiply_adds": network_cost.count_multiply_adds(network, 1, *size, targets)["total"],
        "activation_bytes": network_cost.count_activations(network, 1, *size, targets),
    }


def serve(name, size):
    """Do what is asked for on standard input, a line each; answers are lines of JSON."""
    keep_freed_memory()
    detector = build(name)
    network = detector.network
    use_cpu_feed_forward(network)
    works = {
        "training": network_cost.training_step(network, detector.criterion, 1, *size, objects=OBJECTS),
        "inference": network_cost.inference(network, 1, *size),
    }
    for line in sys.stdin:
        request, work = line.split()
        network.train(work == "training")
        torch.manual_seed(0)  # of the denoising draws
        print(json.dumps({"time": time_of, "peak": peak_of}[request](works[work])), flush=True)


def time_of(work):
    """(wall, processor) seconds of one run."""
    start = clock(DEVICE)
    work()
    return [end - begin for begin, end in zip(start, clock(DEVICE), strict=True)]


def peak_of(work):
    """Bytes that the process holds at most in one run."""
    return peak_memory(work, DEVICE)[1]


def start_worker(name, options):
    """A process with one recipe."""
    command = [sys.executable, __file__, "--serve", name, "--size", *map(str, options.size)]
    return Worker(command, {**os.environ, "OMP_NUM_THREADS": str(options.threads)})


def measure(names, options):
    """Name -> what its process measured; in every round each runs once."""
    workers = {name: start_worker(name, options) for name in names}
    found = {name: {"peak_bytes": worker.ask("peak", "training")} for name, worker in workers.items()}
    for work in ("training", "inference"):
        for worker in workers.values():  # warms up
            worker.ask("time", work)
        rounds = [{name: worker.ask("time", work) for name, worker in workers.items()} for _ in range(options.rounds)]
        for name in names:
            wall, processor = zip(*(times[name] for times in rounds), strict=True)
            found[name] |= {f"{work}_wall_seconds": wall, f"{work}_seconds": processor}
    for worker in workers.values():
        worker.close()
    return found


def ratio(row, base, key):
    """Median over rounds of a row's seconds relative to DINO's."""
    return statistics.median(a / b for a, b in zip(row[key], base[key], strict=True))


def cells(row, base):
    """The columns of a row of the table, as text."""
    own = row["parameters"] - row["branch_parameters"]
    parameters = f"{row['parameters'] / 1e6:.1f} M" + (f", {own / 1e6:.1f} M" if own != row["parameters"] else "")
    return [
        f"[{row['recipe']}](../projects/dino/configs/{recipe_of(row['recipe'])}.py)" if row is not base else "DINO",
        parameters,
        *(f"{row[key] / 1e9:.0f}" for key in ("inference_multiply_adds", "training_multiply_adds")),
        f"{row['activation_bytes'] / 2**30:.2f}",
        *(f"{ratio(row, base, key):.2f}" for key in ("training_seconds", "inference_seconds")),
        f"{row['peak_bytes'] / base['peak_bytes']:.2f}",
    ]


def table(results):
    """Results -> Markdown."""
    base = next(row for row in results["rows"] if row["recipe"] == "dino")
    head = ["", "parameters (training, inference)", "G multiply-adds: inference", "training, forward"]
    head += ["GiB of activations", "time of a training step", "time of an inference", "memory in training"]
    lines = [head, ["---"] * len(head), *(cells(row, base) for row in results["rows"])]
    about = results["origin"]
    size, seconds = "x".join(map(str, results["size"])), statistics.median(base["training_seconds"])
    sentence = (
        f"Counted: one image of {FULL_SIZE[0]}x{FULL_SIZE[1]} with {OBJECTS} objects. The last three columns are "
        f"measured relative to DINO (a training step of {seconds:.1f} s, {base['peak_bytes'] / 2**30:.2f} GiB) on one "
        f"image of {size}, {results['threads']} thread of {about['hardware']['cpu']}, torch "
        f"{about['versions']['torch']}, load {about['load_before'][0]:.1f} before, {results['rounds']} rounds, commit "
        f"{about['commit'][:10]}: `{results['command']}`."
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", sentence])


def write_page(results, page=None):
    """Put the table between its marks."""
    page = page or PAGE
    text, marks = page.read_text(), re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    made = f"{BEGIN}\n\n{table(results)}\n\n{END}"
    write_whole(page, lambda part: part.write_text(marks.sub(lambda _: made, text)))


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=DESCENDANTS, default=DESCENDANTS, help="beside DINO")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 416), metavar=("HEIGHT", "WIDTH"), help="measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the JSON file")
    parser.add_argument("--report", action="store_true", help="only write the table of the present results")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    options = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options.size)
        return
    path = options.results / f"variants_cpu_{options.threads}thread.json"
    if not options.report:
        names = ["dino", *options.recipes]
        found = {
            "origin": origin(DEVICE),
            "command": shlex.join(["python", "benchmarks/variants.py", *(sys.argv[1:] if argv is None else argv)]),
        }
        found |= {"size": list(options.size), "rounds": options.rounds, "threads": options.threads}
        measured = measure(names, options)
        found["rows"] = [{"recipe": name, **count(name), **measured[name]} for name in names]
        write_whole(path, lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    write_page(json.loads(path.read_text()))


if __name__ == "__main__":
    sys.exit(report_errors(main))
