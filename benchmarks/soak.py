"""Kill small trainings at random moments and compare their results with those of unbroken ones.

    python benchmarks/soak.py --results output/soak
    python benchmarks/soak.py --kills 5 --seed 1 --results output/soak     # shorter

A kill is SIGKILL to every process of the training, at a random moment between its start and its end: while it starts,
trains, evaluates or writes a checkpoint. Then it is resumed, until it ends. Losses, weights, optimizer state and
averaged weights must equal those of the unbroken run to the last bit. Needs no GPU and no data; takes half an
hour on two CPU cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.d2.processes import assert_same, checkpoint, command, environment, losses  # noqa: E402

OPTIONS = (
    "dataloader.train.num_workers=1",
    "train.amp.enabled=True",
    "train.amp.dtype=float16",
    "train.ema.enabled=True",
    "train.max_iter=100",
    "train.eval_period=20",
    "train.checkpointer.period=5",
)
LAUNCHERS = {"one process": (), "two processes": ("--standalone", "--nproc-per-node", "2")}


def start(folder: Path, launcher: tuple, *more: str) -> subprocess.Popen:
    """A training in a session of its own, so that its group can be killed as a whole."""
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            command(folder, *more, *OPTIONS, launcher=launcher),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def again(folder: Path) -> list[str]:
    """The flag that continues a training in the folder: a kill can come before the first checkpoint."""
    return ["--resume"] if any(folder.glob("run/model_*.pth")) else ["--overwrite"]


def children_of(process: subprocess.Popen) -> list[int]:
    """Its direct children: torchrun starts each worker in a session of its own."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def kill(process: subprocess.Popen) -> None:
    """End a training at once, with its children."""
    for pid in children_of(process):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def run_with_kills(folder: Path, launcher: tuple, kills: int, seconds: float, draw: random.Random) -> list[dict]:
    """Kill `kills` times at moments of up to `seconds` after the start, then run to the end -> what each kill met."""
    met = []
    while len(met) < kills:
        process = start(folder, launcher, *again(folder))
        delay = draw.uniform(0, seconds)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            kill(process)
        else:
            if process.returncode:
                raise SystemExit(f"the training failed by itself: {folder / 'output.txt'}")
            break  # it has come to its end
        done = losses(folder) if (folder / "run/metrics.json").exists() else []
        written = [path.name for path in folder.glob("run/*.part")]
        met.append({"seconds": round(delay, 2), "iterations": len(done), "half written": written})
    process = start(folder, launcher, *again(folder))
    if process.wait():
        raise SystemExit(f"the training failed: {folder / 'output.txt'}")
    return met


def compare(folder: Path, unbroken: Path) -> None:
    """Raise an AssertionError unless both came to the same end by the same way."""
    assert losses(folder) == losses(unbroken), "losses differ"
    assert_same(checkpoint(folder), checkpoint(unbroken))
    ours, theirs = (json.loads((x / "run/evaluations.json").read_text()) for x in (folder, unbroken))
    assert ours == theirs, "evaluations differ"


def soak(name: str, folder: Path, kills: int, draw: random.Random) -> dict:
    """One unbroken run, then killed ones until `kills` are reached -> a summary."""
    unbroken = folder / "unbroken"
    unbroken.mkdir(parents=True)
    began = time.monotonic()
    if start(unbroken, LAUNCHERS[name]).wait():
        raise SystemExit(f"the unbroken training failed: {unbroken / 'output.txt'}")
    seconds = time.monotonic() - began
    met: list[dict] = []
    runs = 0
    with tqdm(total=kills, desc=name, unit="kill") as bar:
        while len(met) < kills:
            broken = folder / f"broken_{runs}"
            broken.mkdir()
            new = run_with_kills(broken, LAUNCHERS[name], min(5, kills - len(met)), seconds, draw)
            compare(broken, unbroken)
            met += new
            runs += 1
            bar.update(len(new))
    return {"kills": len(met), "runs": runs, "seconds of the unbroken run": round(seconds, 1), "met": met}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for one process; half as many for two (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--results", type=Path, default=Path("output/soak"), help="folder for soak.json")
    return parser


def main() -> None:
    """Parse, soak, report."""
    args = build_parser().parse_args()
    draw = random.Random(args.seed)
    summary = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(LAUNCHERS):
            summary[name] = soak(name, Path(folder, name.replace(" ", "_")), max(1, args.kills // (number + 1)), draw)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "soak.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, result in summary.items():
        print(
            f"{name}: {result['kills']} kills in {result['runs']} runs, all ended as the unbroken one, to the last bit"
        )


if __name__ == "__main__":
    main()
