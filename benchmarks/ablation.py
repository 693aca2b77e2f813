"""Train a table of recipes x seeds on one budget, and write the results to projects/dino/README.md.

    python benchmarks/ablation.py --plan          print the open cells and their cost
    python benchmarks/ablation.py --jobs 2        train them; after an interruption, the same command continues
    python benchmarks/ablation.py --data shapes --recipes chain_5_contrastive encoder_6 --seeds 3
    python benchmarks/ablation.py --report        only write tables and pictures of the present results

A cell is one training by tools/lazyconfig_train_net.py on one processor core, or one GPU. Its result is a file in
benchmarks/results/ablation/, written whole at the end. An interrupted cell begins again, so that its processor seconds
are those of a whole training. Several of these programs can run at once: this program and the training lock each cell.
If this program is killed, Linux ends its trainings with it.

With other --results, the page is ablation.md in that folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import dino
from dino.data.coco import CocoImages
from dino.evaluation.anchor_distance import average_topk_distance
from dino.utils.files import DataError, make_folder, write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import ablation_report  # noqa: E402
from ablation_report import ATD, CHAIN, DENOISING, DESCENDANTS, LAYERS, OTHERS, RESULTS  # noqa: E402
from cells import Running, Table, exit_with, launch, lock, run_cells  # noqa: E402
from measure import git, hardware  # noqa: E402
from run_demo import versions  # noqa: E402

RECIPES = ROOT / "projects/dino/configs/ablation"
SEEDS = 3
SOURCES = (
    "dino",
    "configs",
    "projects/dino/configs",
    "tools/lazyconfig_train_net.py",
    "tools/make_shapes.py",
    "setup.py",
)
EMA, LAST = "ema/bbox/", "bbox/"  # prefixes of keys in evaluations.json: averaged weights, last weights
HARD_SHAPES = ("--train", "600", "--val", "100", "--hard")


class Cell(NamedTuple):
    """One training of the table."""

    data: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files and in messages."""
        return f"{self.data}/{self.recipe}_{self.seed}"


def rounds(data: str, recipes: tuple | list, seeds: int) -> list[Cell]:
    """Seed 0 of all recipes, then seed 1 of all, …"""
    return [Cell(data, recipe, seed) for seed in range(seeds) for recipe in recipes]


def whole_plan(seeds: int) -> list[Cell]:
    """The chain on both data sets, layers and denoising on the shapes, the other variants once."""
    known = [*rounds("shapes", CHAIN, seeds), *rounds("bccd", CHAIN, seeds)]
    known += rounds("shapes", [*LAYERS, *DENOISING], seeds)
    return list(dict.fromkeys([*known, *rounds("shapes", [*OTHERS, *DESCENDANTS], 1)]))


def wanted_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments ask for."""
    if args.recipes:
        return [cell for data in args.data or ["shapes"] for cell in rounds(data, args.recipes, args.seeds)]
    return [cell for cell in whole_plan(args.seeds) if not args.data or cell.data in args.data]


def plan(args: argparse.Namespace) -> list[Cell]:
    """The wanted cells that have a recipe. Prints which have none.

    Raises:
        DataError: there is no recipe of a given name.
    """
    cells = wanted_cells(args)
    known = {path.stem for path in RECIPES.glob("*.py")}
    missing = sorted({cell.recipe for cell in cells} - known)
    if missing and args.recipes:
        raise DataError(f"no recipe {', '.join(missing)} in {RECIPES}; there are {', '.join(sorted(known))}")
    if missing:
        print(f"left out, no such recipe yet: {', '.join(missing)}")
    return [cell for cell in cells if cell.recipe in known]


def data_files(data: str, runs: Path) -> dict[str, Path]:
    """Annotations and image folders of a data set. Draws missing shapes.

    Raises:
        DataError: a file is missing.
    """
    if data == "shapes":
        folder = runs / "data/shapes"
        if not folder.exists():
            make_folder(folder.parent)
            command = [sys.executable, str(ROOT / "tools/make_shapes.py"), str(folder), *HARD_SHAPES]
            subprocess.run(command, check=True)
        files = {"train-images": folder / "train", "val-images": folder / "val"}
    else:
        folder = Path(os.environ.get("DINO_BCCD", ROOT.parent / "shared/data/bccd"))
        files = {"train-images": folder / "images", "val-images": folder / "images"}
    files |= {"train-json": folder / "train.json", "val-json": folder / "val.json"}
    for path in files.values():
        if not path.exists():
            raise DataError(f"data set {data}: {path} is missing" + ("; set DINO_BCCD" if data == "bccd" else ""))
    return files


def fingerprint(files: dict[str, Path]) -> str:
    """Of the two annotation files."""
    content = files["train-json"].read_bytes() + files["val-json"].read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def training_command(cell: Cell, files: dict[str, Path], run: Path, overrides: list[str]) -> list[str]:
    """The command that trains a cell, run in the root of the repository; paths are relative to it."""
    options = [word for key in sorted(files) for word in (f"--{key}", os.path.relpath(files[key], ROOT))]
    recipe = os.path.relpath(RECIPES / f"{cell.recipe}.py", ROOT)
    folder = os.path.relpath(run, ROOT)
    settings = [f"train.output_dir={folder}", f"train.seed={cell.seed}", *overrides]
    return ["python", "tools/lazyconfig_train_net.py", "--config-file", recipe, *options, *settings]


def start(cell: Cell, slot: int, args: argparse.Namespace) -> Running | None:
    """Begin a training; None if its cell is locked or done by now."""
    run = args.runs / cell.name
    held = lock(run.with_name(f"{run.name}.lock"))
    if held is None:
        return None
    if result_path(cell, args.results).exists():
        held.close()
        return None
    shutil.rmtree(run, ignore_errors=True)  # of an interrupted cell
    files = data_files(cell.data, args.runs)
    command = training_command(cell, files, run, args.overrides)
    about = {
        **cell._asdict(),
        "fingerprint": fingerprint(files),
        "command": " ".join(command),
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--", *SOURCES)),
    }
    return launch(cell, command, run.with_name(f"{run.name}.txt"), held, about, slot)


def finish(running: Running, processor_seconds: float, args: argparse.Namespace) -> None:
    """Write the result of a training, then remove its checkpoints. Keep log, curves and predictions."""
    run = args.runs / running.cell.name
    files = data_files(running.cell.data, args.runs)
    training_images = len(json.loads(files["train-json"].read_text())["images"])
    evaluations = json.loads((run / "evaluations.json").read_text())
    result = {
        **running.about,
        "budget": budget(run, evaluations, training_images),
        **metrics_of(evaluations[-1]),
        **anchor_distances(run / "model_final.pth", files),
        "curve": [{"iteration": e["iteration"], "AP": e[f"{EMA}AP"], "last_AP": e[f"{LAST}AP"]} for e in evaluations],
        "processor_seconds": round(processor_seconds, 1),
        "wall_seconds": round(time.monotonic() - running.began, 1),
        "hardware": {**hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "threads": 1},
        "versions": versions(),
    }
    path = result_path(running.cell, args.results)
    make_folder(path.parent)
    write_whole(path, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    for checkpoint in run.glob("*.pth"):
        checkpoint.unlink()


def metrics_of(evaluation: dict) -> dict[str, float | None]:
    """Metrics of the averaged weights, and with `last_` in front, of the last ones."""
    found = {}
    for prefix, name in ((EMA, ""), (LAST, "last_")):
        found |= {name + key.removeprefix(prefix): v for key, v in evaluation.items() if key.startswith(prefix)}
    return found


def anchor_distances(checkpoint: Path, files: dict[str, Path]) -> dict[str, float]:
    """ATD(100) of the averaged weights, and with `last_` in front, of the last ones."""
    found = {}
    for copy, name in (("ema", ""), ("model", "last_")):
        detector = dino.load(checkpoint, copy=copy)
        data = CocoImages.for_detector(files["val-json"], files["val-images"], detector)
        found[f"{name}{ATD}"] = average_topk_distance(detector, data)
    return found


def budget(run: Path, evaluations: list[dict], images: int) -> dict[str, float]:
    """Length of a training in iterations, and in epochs of `images` images."""
    batch = int(re.search(r"total_batch_size: (\d+)", (run / "config.yaml").read_text()).group(1))
    iterations = evaluations[-1]["iteration"]
    epochs = round(iterations * batch / images, 2)
    return {"iterations": iterations, "batch": batch, "epochs": epochs, "evaluations": len(evaluations)}


def result_path(cell: Cell, results: Path) -> Path:
    """File of a cell's result."""
    return results / f"{cell.name}.json"


def summary(cell: Cell, results: Path) -> str:
    """One line about a finished cell."""
    result = json.loads(result_path(cell, results).read_text())
    return f"{cell.name}: AP {result['AP']:.1f}, {result['processor_seconds'] / 60:.1f} processor minutes"


def as_table(args: argparse.Namespace) -> Table:
    """What runs the cells."""
    return Table(
        jobs=args.jobs,
        begin=lambda cell, slot: start(cell, slot, args),
        finish=lambda running, seconds: finish(running, seconds, args),
        summary=lambda cell: summary(cell, args.results),
    )


def print_plan(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """Print the open cells, and their cost as estimated from the finished ones -> the open cells.

    Raises:
        DataError: the finished cells had another budget.
    """
    open_cells = [cell for cell in cells if not result_path(cell, args.results).exists()]
    print(f"{len(cells)} cells, {len(cells) - len(open_cells)} of them done. To do, in this order:")
    for cell in open_cells:
        print(f"  {cell.name}")
    known = [result for data in sorted({c.data for c in cells}) for result in ablation_report.load(args.results, data)]
    check_iterations(known, args)
    if open_cells:
        print(estimate(known, len(open_cells), args.jobs))
    return open_cells


def check_iterations(known: list[dict], args: argparse.Namespace) -> None:
    """Raise a DataError if finished cells have another budget than the arguments."""
    for result in known:
        if args.iterations not in (None, result["budget"]["iterations"]):
            raise DataError(
                f"--iterations {args.iterations}, but {args.results} holds cells of {result['budget']['iterations']}: "
                "give the same number, or another --results"
            )


def estimate(known: list[dict], count: int, jobs: int) -> str:
    """Cost of `count` cells, estimated from the finished ones, in words."""
    if not known:
        return "no cell is finished, so the cost is not known yet"
    processor, wall = (
        sum(r[key] for r in known) / len(known) * count / 3600 for key in ("processor_seconds", "wall_seconds")
    )
    hours = f"{processor:.1f} processor hours, {wall / jobs:.1f} hours with --jobs {jobs}"
    return f"estimate from {len(known)} finished cells: {hours}"


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("shapes", "bccd"), help="data sets; none for the whole table")
    names = f"names in {os.path.relpath(RECIPES, ROOT)}; none for the whole table"
    parser.add_argument("--recipes", nargs="+", help=names)
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help=f"of the first three tables, or of --recipes ({SEEDS})"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one for each core or GPU (default 1)")
    parser.add_argument("--iterations", type=int, help="of every training; the recipe's if not given")
    parser.add_argument("--evaluations", type=int, default=4, help="of every training of --iterations (default 4)")
    parser.add_argument("--runs", type=Path, default=ROOT / "output/ablation", help="folder of the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and end")
    parser.add_argument("--report", action="store_true", help="write tables and pictures, and end")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    args = build_parser().parse_args(argv)
    if min(args.seeds, args.jobs, args.iterations or 1, args.evaluations) < 1:
        raise DataError("--seeds, --jobs, --iterations and --evaluations must be 1 or more")
    args.runs, args.results = args.runs.resolve(), args.results.resolve()
    args.overrides = []
    if args.iterations:
        period = -(-args.iterations // args.evaluations)
        args.overrides = [f"train.max_iter={args.iterations}", f"train.eval_period={period}"]
        args.overrides += [f"train.checkpointer.period={args.iterations}"]
    return args


def run(argv: list[str] | None) -> list[str]:
    """Plan, train, report -> error messages."""
    args = parse(argv)
    failures = []
    if not args.report:
        cells = print_plan(plan(args), args)
        if args.plan:
            return []
        failures = run_cells(cells, as_table(args))
    ablation_report.write(args.results, ablation_report.page_of(args.results))
    return failures


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    exit_with(lambda: run(argv))


if __name__ == "__main__":
    main()
