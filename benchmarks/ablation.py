"""Train a table of recipes x seeds on one budget, and write the results to projects/dino/README.md.

    python benchmarks/ablation.py --plan          print the open cells and their cost
    python benchmarks/ablation.py --jobs 2        train them; after an interruption, the same command continues
    python benchmarks/ablation.py --data shapes --recipes chain_5_twice encoder_6 --seeds 3
    python benchmarks/ablation.py --report        only write tables and pictures of the present results

A cell is one training by tools/lazyconfig_train_net.py on one processor core, or one GPU. Its result is a file in
benchmarks/results/ablation/, written whole at the end. An interrupted cell begins again, so that its processor seconds
are those of a whole training. Several of these programs can run at once: this program and the training lock each cell.
If this program is killed, Linux ends its trainings with it.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import torch
from tqdm import tqdm

from dino.utils.files import DataError, UserError, make_folder, write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import ablation_report  # noqa: E402
from ablation_report import ANCESTORS, CHAIN, RESULTS, VARIANTS  # noqa: E402
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
HARD_SHAPES = ("--train", "600", "--val", "100", "--hard")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Cell(NamedTuple):
    """One training of the table."""

    data: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files and in messages."""
        return f"{self.data}/{self.recipe}_{self.seed}"


class Running(NamedTuple):
    """A running training. `lock` stays open as long; `about` goes into its result."""

    cell: Cell
    process: subprocess.Popen
    lock: IO
    about: dict
    began: float
    slot: int


def rounds(data: str, recipes: tuple | list, seeds: int) -> list[Cell]:
    """Seed 0 of all recipes, then seed 1 of all, …"""
    return [Cell(data, recipe, seed) for seed in range(seeds) for recipe in recipes]


def whole_plan(seeds: int) -> list[Cell]:
    """The chain on both data sets, then the other variants and the ancestors once: most important first."""
    chain = [cell for data in ("shapes", "bccd") for cell in rounds(data, CHAIN, seeds)]
    return [*chain, *rounds("shapes", [*VARIANTS, *ANCESTORS], 1)]


def plan(args: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments ask for. Prints which have no recipe, and leaves them out.

    Raises:
        DataError: there is no recipe of a given name.
    """
    cells = _named_cells(args) if args.recipes else _cells_of_table(args)
    known = {path.stem for path in RECIPES.glob("*.py")}
    missing = sorted({cell.recipe for cell in cells} - known)
    if missing and args.recipes:
        raise DataError(f"no recipe {', '.join(missing)} in {RECIPES}; there are {', '.join(sorted(known))}")
    if missing:
        print(f"left out, no such recipe yet: {', '.join(missing)}")
    return [cell for cell in cells if cell.recipe in known]


def _named_cells(args: argparse.Namespace) -> list[Cell]:
    """The given recipes on the given data sets; without data sets, on the shapes."""
    return [cell for data in args.data or ["shapes"] for cell in rounds(data, args.recipes, args.seeds)]


def _cells_of_table(args: argparse.Namespace) -> list[Cell]:
    """The table on the given data sets; without data sets, all of it."""
    return [cell for cell in whole_plan(args.seeds) if not args.data or cell.data in args.data]


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


def die_with_parent(parent: int) -> Callable[[], None]:
    """First action of a new process: have Linux kill it when the runner ends."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl:
            prctl(DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != parent:  # the runner has ended already
                os._exit(1)

    return prepare


def lock(path: Path) -> IO | None:
    """Lock a cell. Its training inherits the lock. None if another program or an orphan holds it."""
    make_folder(path.parent)
    file = path.open("w")  # closed when the training has ended
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


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
    gpu = slot % max(1, torch.cuda.device_count())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(gpu)}
    make_folder(run.parent)
    with open(run.with_name(f"{run.name}.txt"), "w") as output:
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            pass_fds=[held.fileno()],
            preexec_fn=die_with_parent(os.getpid()),
            start_new_session=True,  # Ctrl-C comes here, and `run_cells` passes it on
        )
    return Running(cell, process, held, about, time.monotonic(), slot)


def ended(running: Running) -> tuple[int, float] | None:
    """Exit code and processor seconds of an ended training and its children; None if it still runs."""
    pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
    if not pid:
        return None
    running.process.returncode = os.waitstatus_to_exitcode(status)
    return running.process.returncode, usage.ru_utime + usage.ru_stime


def finish(running: Running, processor_seconds: float, args: argparse.Namespace) -> None:
    """Write the result of a training, then remove its checkpoints. Keep log, curves and predictions."""
    run = args.runs / running.cell.name
    annotations = json.loads(data_files(running.cell.data, args.runs)["train-json"].read_text())
    training_images = len(annotations["images"])
    evaluations = json.loads((run / "evaluations.json").read_text())
    result = {
        **running.about,
        "budget": budget(run, evaluations, training_images),
        **{key.removeprefix("bbox/"): value for key, value in evaluations[-1].items() if key != "iteration"},
        "curve": [{"iteration": entry["iteration"], "AP": entry["bbox/AP"]} for entry in evaluations],
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


def budget(run: Path, evaluations: list[dict], images: int) -> dict[str, float]:
    """Length of a training in iterations, and in epochs of `images` images."""
    batch = int(re.search(r"total_batch_size: (\d+)", (run / "config.yaml").read_text()).group(1))
    iterations = evaluations[-1]["iteration"]
    epochs = round(iterations * batch / images, 2)
    return {"iterations": iterations, "batch": batch, "epochs": epochs, "evaluations": len(evaluations)}


def result_path(cell: Cell, results: Path) -> Path:
    """File of a cell's result."""
    return results / f"{cell.name}.json"


def last_line(path: Path) -> str:
    """Last line of a failed training's output."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "no output")


def settle(running: Running, code: int, seconds: float, args: argparse.Namespace) -> str:
    """Write the result of an ended training -> an error message, or ""."""
    output = args.runs / f"{running.cell.name}.txt"
    try:
        if code:
            return f"{running.cell.name} failed: {last_line(output)} ({output})"
        finish(running, seconds, args)
        return ""
    except (OSError, ValueError, LookupError, AttributeError) as error:  # the run's record is incomplete
        return f"{running.cell.name} failed: its record can't be read: {error} ({output})"
    finally:
        running.lock.close()


def run_cells(cells: list[Cell], args: argparse.Namespace) -> list[str]:
    """Train the open cells, `args.jobs` at a time, in this order -> error messages."""
    waiting, failures = list(cells), []
    busy: list[Running] = []
    try:
        with tqdm(total=len(cells), desc="cells", unit="cell") as bar:
            while waiting or busy:
                _fill_slots(waiting, busy, args, bar)
                failures += _settle_ended(busy, args, bar)
                time.sleep(args.poll)
    finally:
        for running in busy:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
    return failures


def _fill_slots(waiting: list[Cell], busy: list[Running], args: argparse.Namespace, bar: tqdm) -> None:
    """Move cells from `waiting` to `busy` while fewer than `args.jobs` trainings run."""
    while waiting and len(busy) < args.jobs:
        slot = min(set(range(args.jobs)) - {running.slot for running in busy})
        begun = start(waiting.pop(0), slot, args)
        busy += [begun] if begun else []
        bar.update(begun is None)
        bar.set_postfix_str(", ".join(running.cell.name for running in busy))


def _settle_ended(busy: list[Running], args: argparse.Namespace, bar: tqdm) -> list[str]:
    """Remove the ended trainings from `busy` and write their results -> error messages."""
    failures = []
    for running in list(busy):
        if found := ended(running):
            busy.remove(running)
            failure = settle(running, *found, args)
            failures += [failure] if failure else []
            bar.update()
            bar.write(failure or summary(running.cell, args.results), file=sys.stderr)
    return failures


def summary(cell: Cell, results: Path) -> str:
    """One line about a finished cell."""
    result = json.loads(result_path(cell, results).read_text())
    return f"{cell.name}: AP {result['AP']:.1f}, {result['processor_seconds']:.0f} processor seconds"


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
    _check_iterations(known, args)
    if open_cells:
        print(_estimate(known, len(open_cells), args.jobs))
    return open_cells


def _check_iterations(known: list[dict], args: argparse.Namespace) -> None:
    """Compare --iterations with the finished cells.

    Raises:
        DataError: the finished cells had another budget.
    """
    for result in known:
        if args.iterations not in (None, result["budget"]["iterations"]):
            raise DataError(
                f"--iterations {args.iterations}, but {args.results} holds cells of {result['budget']['iterations']}: "
                "give the same number, or another --results"
            )


def _estimate(known: list[dict], cells: int, jobs: int) -> str:
    """Cost of so many cells, estimated from the results of the finished ones."""
    if not known:
        return "no cell is finished, so the cost is not known yet"
    processor, wall = (
        sum(r[key] for r in known) / len(known) * cells / 3600 for key in ("processor_seconds", "wall_seconds")
    )
    return (
        f"estimate from {len(known)} finished cells: {processor:.1f} processor hours, {wall / jobs:.1f} hours "
        f"with --jobs {jobs}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("shapes", "bccd"), help="data sets; none for the whole table")
    names = f"names in {os.path.relpath(RECIPES, ROOT)}; none for the whole table"
    parser.add_argument("--recipes", nargs="+", help=names)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the chain, or of --recipes (default {SEEDS})")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one for each core or GPU (default 1)")
    parser.add_argument("--iterations", type=int, help="of every training; the recipe's if not given")
    parser.add_argument("--evaluations", type=int, default=5, help="of every training of --iterations (default 5)")
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
    args.runs, args.results, args.poll = args.runs.resolve(), args.results.resolve(), 0.2
    args.overrides = []
    if args.iterations:
        period = max(1, args.iterations // args.evaluations)
        args.overrides = [f"train.max_iter={args.iterations}", f"train.eval_period={period}"]
        args.overrides += [f"train.checkpointer.period={args.iterations}"]
    return args


def main(argv: list[str] | None = None) -> None:
    """Plan, train, report."""
    try:
        args = parse(argv)
        failures = []
        if not args.report:
            cells = print_plan(plan(args), args)
            if args.plan:
                return
            failures = run_cells(cells, args)
        ablation_report.write(args.results)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    if failures:
        sys.exit(f"error: {len(failures)} cells failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
