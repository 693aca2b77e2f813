"""Train DINO and torchvision's detectors for the same processor minutes, and write the results to a page.

    python benchmarks/compare_detectors.py --data raccoon --minutes 40 --jobs 2 \\
        --config-file projects/dino/configs/dino_efficientnet_lite0_small_data.py
    python benchmarks/compare_detectors.py --plan ...     print the open cells
    python benchmarks/compare_detectors.py --report       only write table and picture of the present results

All share backbone, weights, pictures, augmentation, image size, evaluation, averaging of weights, and processor minutes
(user and system time of the training without its evaluations); each has its own optimiser. Iterations of the first cell
of a detector are timed, and its trainings get as many iterations as the minutes allow. Each training is
tools/lazyconfig_train_net.py on one thread, reading data in the same process. A data set is a folder with train.json,
val.json, and images/ (or train/ and val/); with --test, the last weights are evaluated on test.json, once.

For trials of settings, give other --results and --runs, and --settings faster_rcnn:optimizer.lr=0.01. The page of other
results is comparison.md in their folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from dino.utils.files import DataError, make_folder, write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import compare_report  # noqa: E402
from cells import Running, Table, exit_with, launch, lock, run_cells  # noqa: E402
from compare_report import RESULTS  # noqa: E402
from compared_recipes import CLOCK, DETECTORS, DINO, SCHEDULES, recipe_for  # noqa: E402
from measure import git, hardware, version_of  # noqa: E402
from processor_clock import ClockRecord, read_clock  # noqa: E402
from run_demo import versions  # noqa: E402

SEEDS = 3
TIMED_ITERATIONS = 40
TIMED_RATE = 1e-6  # learning rate while timing: a usual one can diverge after a warm-up of two iterations
SOURCES = ("dino", "configs", "projects/dino/configs", "tools/lazyconfig_train_net.py", "setup.py", "benchmarks/*.py")
OWN_SETTING = re.compile(rf"({'|'.join(DETECTORS)}):(.+)")


class Cell(NamedTuple):
    """One step of the work: time the iterations, train, or evaluate on the test split."""

    setup: str  # data and recipe
    detector: str
    seed: int
    stage: str = "training"  # or "timing" (of seed 0) or "test"

    @property
    def name(self) -> str:
        """Of its files and in messages."""
        ending = "" if self.stage == "training" else f"_{self.stage}"
        return f"{self.setup}/{self.detector}_{self.seed}{ending}"


def setup_of(folder: Path, args: argparse.Namespace) -> str:
    """Name of a data set with a recipe."""
    return f"{folder.name}-{Path(args.config_file).stem}"


def cells_of(stage: str, args: argparse.Namespace) -> list[Cell]:
    """All cells of a stage: seed 0 of all detectors, then seed 1 of all, …"""
    seeds = [0] if stage == "timing" else range(args.seeds)
    setups = [name for name, folder in args.folders.items() if stage != "test" or (folder / "test.json").exists()]
    return [Cell(setup, name, seed, stage) for setup in setups for seed in seeds for name in args.detectors]


def data_files(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotations and image folder of a split.

    Raises:
        DataError: one is missing.
    """
    images = folder / "images" if (folder / "images").is_dir() else folder / split
    for path in (folder / f"{split}.json", images):
        if not path.exists():
            raise DataError(f"data set {folder}: {path} is missing")
    return folder / f"{split}.json", images


def fingerprint(folder: Path) -> str:
    """Of the annotations for training and validation."""
    content = b"".join(data_files(folder, split)[0].read_bytes() for split in ("train", "val"))
    return hashlib.sha256(content).hexdigest()[:16]


def settings_for(detector: str, settings: list[str]) -> list[str]:
    """The overrides of one detector: those without a name in front, and its own."""
    named = [(found.groups() if (found := OWN_SETTING.fullmatch(word)) else (detector, word)) for word in settings]
    return [word for name, word in named if name == detector]


def result_path(cell: Cell, args: argparse.Namespace) -> Path:
    """The file that a cell writes, or completes."""
    folder = args.runs if cell.stage == "timing" else args.results
    return folder / f"{cell.name if cell.stage == 'timing' else training_name(cell)}.json"


def is_done(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether a cell has its result. Iterations of an earlier recipe are timed again.

    Raises:
        DataError: the result is of another recipe, of other settings or minutes.
    """
    path = result_path(cell, args)
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    same = result["recipe_hash"] == recipe_hash(cell, args)
    if cell.stage == "timing":
        return same
    if not same or result["minutes"] != args.minutes:
        raise DataError(f"{path} is of another recipe, of other settings or minutes: give the same, or other --results")
    return cell.stage == "training" or "test" in result


def iterations_for(minutes: float, start_seconds: float, step_seconds: float) -> int:
    """How many iterations a budget of processor minutes allows.

    Raises:
        DataError: none.
    """
    count = int((60 * minutes - start_seconds) / step_seconds)
    if count < 1:
        raise DataError(f"--minutes {minutes:g} is too short: the start takes {start_seconds:.0f} s, an iteration more")
    return count


def length_of(cell: Cell, args: argparse.Namespace) -> tuple[int, int]:
    """Iterations of a cell, and between its evaluations; 0 for one at the end."""
    if cell.stage == "timing":
        return TIMED_ITERATIONS, 0
    timing = json.loads(result_path(Cell(cell.setup, cell.detector, 0, "timing"), args).read_text())
    iterations = iterations_for(args.minutes, timing["start_seconds"], timing["step_seconds"])
    return iterations, -(-iterations // args.evaluations)


def write_recipe(cell: Cell, args: argparse.Namespace) -> Path:
    """Write the recipe of a detector, without the settings -> its file."""
    path = args.runs / cell.setup / f"{cell.detector}.yaml"
    cfg = recipe_for(cell.detector, args.config_file, args.schedule)
    make_folder(path.parent)
    write_whole(path, lambda part: LazyConfig.save(cfg, str(part)))
    return path


def recipe_hash(cell: Cell, args: argparse.Namespace) -> str:
    """Of recipe and settings: cells of one detector must agree."""
    text = "\n".join([write_recipe(cell, args).read_text(), *settings_for(cell.detector, args.settings)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training_command(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The command that trains a cell in the root of the repository."""
    run, folder, recipe = args.runs / cell.name, args.folders[cell.setup], write_recipe(cell, args)
    files = [word for split in ("train", "val") for word in split_options(folder, split)]
    iterations, period = length_of(cell, args)
    overrides = {
        "output_dir": relative(run),
        "seed": cell.seed,
        "max_iter": iterations,
        "eval_period": period,
        "checkpointer.period": iterations,
    }
    words = [f"train.{key}={value}" for key, value in overrides.items()]
    words += settings_for(cell.detector, args.settings)
    words += [f"optimizer.lr={TIMED_RATE}"] if cell.stage == "timing" else []
    return ["python", "tools/lazyconfig_train_net.py", "--config-file", relative(recipe), *files, *words]


def split_options(folder: Path, split: str) -> list[str]:
    """The two options of the training program for a split."""
    annotations, images = data_files(folder, split)
    return [f"--{split}-json", relative(annotations), f"--{split}-images", relative(images)]


def relative(path: Path) -> str:
    """Path from the root of the repository."""
    return os.path.relpath(path, ROOT)


def test_command(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The command that evaluates a training's last weights on the test split."""
    annotations, images = data_files(args.folders[cell.setup], "test")
    run = args.runs / training_name(cell)
    return ["python", "benchmarks/compare_test.py", *map(relative, (run, annotations, images))]


def begin(cell: Cell, slot: int, args: argparse.Namespace) -> Running | None:
    """Start a cell; None if it is locked or done by now."""
    run = args.runs / cell.name
    held = lock(run.with_name(f"{run.name}.lock"))
    if held is None:
        return None
    if is_done(cell, args):
        held.close()
        return None
    shutil.rmtree(run, ignore_errors=True)  # of an interrupted cell
    command = (test_command if cell.stage == "test" else training_command)(cell, args)
    return launch(cell, command, run.with_name(f"{run.name}.txt"), held, about(cell, command, args), slot)


def about(cell: Cell, command: list[str], args: argparse.Namespace) -> dict:
    """What a result says of its origin."""
    folder = args.folders[cell.setup]
    return {
        **cell._asdict(),
        "minutes": args.minutes,
        "recipe": Path(args.config_file).stem,
        "settings": settings_for(cell.detector, args.settings),
        "recipe_hash": recipe_hash(cell, args),
        "fingerprint": fingerprint(folder),
        "program": shlex.join(args.words),
        "command": shlex.join(command),
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--", *SOURCES)),
        "load_at_start": os.getloadavg(),
    }


def finish(running: Running, processor_seconds: float, args: argparse.Namespace) -> None:
    """Write the result of an ended cell."""
    cell, run = running.cell, args.runs / running.cell.name
    if cell.stage == "test":
        training = json.loads(result_path(cell, args).read_text())
        result = {**training, "test": json.loads((args.runs / training_name(cell) / "test.json").read_text())}
    elif cell.stage == "timing":
        clock = read_clock(run / CLOCK)._asdict()
        result = {**clock, "recipe_hash": running.about["recipe_hash"]}
        shutil.rmtree(run)
    else:
        result = training_result(running, processor_seconds, args)
    path = result_path(cell, args)
    text = json.dumps(result, indent=1, default=lambda part: part.__qualname__)  # recipes hold functions
    make_folder(path.parent)
    write_whole(path, lambda part: part.write_text(f"{text}\n"))


def training_name(cell: Cell) -> str:
    """Name of the training that a test cell evaluates."""
    return cell._replace(stage="training").name


def training_result(running: Running, processor_seconds: float, args: argparse.Namespace) -> dict:
    """The result of an ended training. Keeps its last weights, log and predictions."""
    cell, run = running.cell, args.runs / running.cell.name
    cfg, clock = LazyConfig.load(str(run / "config.yaml")), read_clock(run / CLOCK)
    evaluations = json.loads((run / "evaluations.json").read_text())
    for path in set(run.glob("*.pth")) - {run / "model_final.pth"}:
        path.unlink()
    images = len(json.loads(data_files(args.folders[cell.setup], "train")[0].read_text())["images"])
    batch = cfg.dataloader.train.total_batch_size
    return {
        **running.about,
        "iterations": evaluations[-1]["iteration"],
        "batch": batch,
        "training_images": images,
        "curve": curve_of(evaluations, clock, batch),
        "training_seconds": round(clock.points[-1].training_seconds, 1),
        "evaluation_seconds": round(clock.evaluation_seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "wall_seconds": round(time.monotonic() - running.began, 1),
        "timing": json.loads(result_path(Cell(cell.setup, cell.detector, 0, "timing"), args).read_text()),
        "optimizer": OmegaConf.to_container(cfg.optimizer, resolve=True),
        "lr_multiplier": OmegaConf.to_container(cfg.lr_multiplier, resolve=True),
        "model": None if cell.detector == DINO else OmegaConf.to_container(cfg.model, resolve=True),
        "ema_decay": cfg.train.ema.decay,
        "hardware": {**hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "threads": 1},
        "versions": {**versions(), "timm": version_of("timm")},
    }


def curve_of(evaluations: list[dict], clock: ClockRecord, batch: int) -> list[dict]:
    """Points of a curve: iteration, images seen, processor seconds, and metrics in percent of raw and averaged weights.

    Raises:
        ValueError: evaluations and clock disagree.
    """
    points = []
    for entry, (iteration, seconds) in zip(evaluations, clock.points, strict=True):
        if entry["iteration"] != iteration:
            raise ValueError(f"evaluated after {entry['iteration']} iterations, but the clock says {iteration}")
        metrics = {
            f"{prefix}{key}": entry[f"{source}bbox/{key}"]
            for prefix, source in (("", ""), ("ema_", "ema/"))
            for key in ("AP", "AP50")
        }
        origin = {"iteration": iteration, "images": iteration * batch, "processor_seconds": round(seconds, 1)}
        points.append({**origin, **metrics})
    return points


def summary(cell: Cell, args: argparse.Namespace) -> str:
    """One line about a finished cell."""
    result = json.loads(result_path(cell, args).read_text())
    if cell.stage == "timing":
        return f"{cell.name}: {result['step_seconds']:.2f} s an iteration, {result['start_seconds']:.0f} s to start"
    found = result["test"] if cell.stage == "test" else result["curve"][-1]
    metrics = ", ".join(f"{key} {found[key]:.1f}" for key in ("AP", "AP50", "ema_AP", "ema_AP50"))
    return f"{cell.name}: {metrics}; {result['training_seconds'] / 60:.1f} processor minutes"


def run_stage(stage: str, args: argparse.Namespace) -> list[str]:
    """Run the open cells of a stage -> error messages."""
    table = Table(
        jobs=args.jobs,
        begin=lambda cell, slot: begin(cell, slot, args),
        finish=lambda running, seconds: finish(running, seconds, args),
        summary=lambda cell: summary(cell, args),
    )
    cells = open_cells(stage, args)
    return run_cells([cell for cell in cells if stage != "test" or result_path(cell, args).exists()], table)


def open_cells(stage: str, args: argparse.Namespace) -> list[Cell]:
    """The cells of a stage that are not done."""
    return [cell for cell in cells_of(stage, args) if not is_done(cell, args)]


def print_plan(args: argparse.Namespace) -> None:
    """Print the open cells and their least cost."""
    for stage in args.stages:
        found = open_cells(stage, args)
        print(f"{stage}: {len(cells_of(stage, args)) - len(found)} cells done, {len(found)} to do, in this order:")
        print("".join(f"  {cell.name}\n" for cell in found), end="")
    hours = len(open_cells("training", args)) * args.minutes / 60
    print(f"trainings without evaluations: {hours:.1f} processor hours, {hours / args.jobs:.1f} hours in all")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="FOLDER", help="data sets")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=[DINO, "faster_rcnn"])
    recipe = "projects/dino/configs/dino_r18_small_data.py"
    stated = f"DINO's recipe, whose backbone and weights all detectors get (default {recipe})"
    parser.add_argument("--config-file", default=recipe, help=stated)
    parser.add_argument("--schedule", choices=SCHEDULES, default="step", help="of torchvision's detectors")
    settings = "overrides of the recipes, key=value for all detectors, or faster_rcnn:key=value for one"
    parser.add_argument("--settings", nargs="+", default=[], metavar="SETTING", help=settings)
    parser.add_argument("--minutes", type=float, default=40, help="of the processor for each training (default 40)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"trainings of each detector (default {SEEDS})")
    parser.add_argument("--evaluations", type=int, default=8, help="of each training (default 8)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one for each core (default 1)")
    parser.add_argument("--test", action="store_true", help="at the end, evaluate the last weights on test.json, once")
    parser.add_argument("--runs", type=Path, default=ROOT / "output/comparison", help="folder of the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and end")
    parser.add_argument("--report", action="store_true", help="write table and picture, and end")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a DataError for arguments that can't be used."""
    if min(args.seeds, args.jobs, args.evaluations) < 1 or args.minutes <= 0:
        raise DataError("--seeds, --jobs, --evaluations and --minutes must be positive")
    if not args.data and not args.report:
        raise DataError("give --data, one or more folders with train.json and val.json")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    args = build_parser().parse_args(argv)
    check(args)
    args.words = ["python", "benchmarks/compare_detectors.py", *(sys.argv[1:] if argv is None else argv)]
    args.runs, args.results = args.runs.resolve(), args.results.resolve()
    args.folders = {setup_of(folder.resolve(), args): folder.resolve() for folder in args.data}
    args.stages = ["timing", "training", *(["test"] if args.test else [])]
    return args


def work(args: argparse.Namespace) -> list[str]:
    """Run all stages -> error messages."""
    failures = []
    for stage in args.stages:
        failures += run_stage(stage, args)
        if failures and stage == "timing":
            break  # trainings need their number of iterations
    return failures


def run(argv: list[str] | None) -> list[str]:
    """Time, train, test, report -> error messages."""
    args = parse(argv)
    if args.plan:
        print_plan(args)
        return []
    failures = [] if args.report else work(args)
    compare_report.write(args.results, compare_report.page_of(args.results))
    return failures


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    exit_with(lambda: run(argv))


if __name__ == "__main__":
    main()
