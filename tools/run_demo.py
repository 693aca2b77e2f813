"""The demonstration: make data, train, evaluate and draw, on a CPU or a GPU.

    make demo          (or, in an environment that is set up: python tools/run_demo.py)

With Detectron2: tools/lazyconfig_train_net.py. Without: tools/plain_train.py. Network, data and metrics are the same.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dino.data.images import read_image
from dino.structures import Detections
from dino.training.run_pictures import draw_val_predictions
from dino.utils.files import free_name

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "projects/dino/configs/dino_r18_shapes.py"
PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "pycocotools")
# The recipe as arguments of plain_train.py, which reads no recipes. A test compares the two networks.
PLAIN_SETTINGS = shlex.split("--size 160 --embed-dim 64 --layers 3 --queries 50 --epochs 6 --lr 4e-4")


def move_aside(folder):
    """Give an earlier result the next free number instead of overwriting it."""
    if folder.exists():
        aside = free_name(folder)
        folder.rename(aside)
        print(f"the earlier {folder} is now {aside}")


def train_with_detectron2(folder, data):
    """-> AP and AP50 in [0, 1], seconds of training, results file."""
    run = folder / "run"
    call("lazyconfig_train_net.py", "--config-file", RECIPE, *data, f"train.output_dir={run}")
    metrics = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    scores = next(m for m in reversed(metrics) if "bbox/AP" in m)
    times = [m["time"] for m in metrics if "time" in m]  # seconds per iteration, medians between two lines
    seconds = sum(times) / len(times) * (scores["iteration"] + 1)
    return scores["bbox/AP"] / 100, scores["bbox/AP50"] / 100, seconds, run / "inference/coco_instances_results.json"


def train_plain(folder, data):
    """-> as `train_with_detectron2`."""
    run = folder / "run"
    call("plain_train.py", *data, *PLAIN_SETTINGS, "--output", run)
    metrics = json.loads((run / "metrics.json").read_text())
    return metrics["AP"], metrics["AP50"], metrics["training_seconds"], run / "results.json"


def call(program, *arguments):
    """Run one of the tools and stop with its exit code if it fails."""
    command = [sys.executable, f"tools/{program}", *map(str, arguments)]
    print("$ " + " ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def draw_pairs(val, folder, results, target, count=4, threshold=0.5):
    """Draw predictions beside the truth, for the first validation images with 5 objects or more."""
    truth = json.loads(val.read_text())
    found, true = (by_image(truth, entries) for entries in (json.loads(results.read_text()), truth["annotations"]))
    chosen = [image for image in truth["images"] if len(true[image["id"]].labels) >= 5][:count]
    images = [torch.from_numpy(read_image(folder / image["file_name"])).permute(2, 0, 1) for image in chosen]
    boxes, _, labels = zip(*(true[image["id"]] for image in chosen), strict=True)
    names = [c["name"] for c in truth["categories"]]
    draw_val_predictions(target, images, [found[i["id"]] for i in chosen], boxes, labels, names, threshold)


def by_image(data, entries):
    """`Detections` of COCO-format entries, by image id; a score of 1 where they have none."""
    images, labels = data["images"], {c["id"]: label for label, c in enumerate(data["categories"])}
    objects = {image["id"]: [] for image in images}
    for entry in entries:
        x, y, w, h = entry["bbox"]
        objects[entry["image_id"]].append((x, y, x + w, y + h, entry.get("score", 1), labels[entry["category_id"]]))
    tables = {image: torch.tensor(rows, dtype=torch.float32).reshape(-1, 6) for image, rows in objects.items()}
    return {image: Detections(rows[:, :4], rows[:, 4], rows[:, 5].long()) for image, rows in tables.items()}


def versions():
    """Versions of the main packages, None for a missing one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output/demo", help="folder of the results")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    folder = args.output.resolve()
    move_aside(folder)
    folder.mkdir(parents=True)
    shapes = folder / "shapes"
    call("make_shapes.py", shapes)
    data = []
    for split in ("train", "val"):
        data += [f"--{split}-json", shapes / f"{split}.json", f"--{split}-images", shapes / split]
    engine = "detectron2" if importlib.util.find_spec("detectron2") else "plain"
    ap, ap50, seconds, results = (train_with_detectron2 if engine == "detectron2" else train_plain)(folder, data)
    draw_pairs(shapes / "val.json", shapes / "val", results, folder / "predictions.png")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu}
    summary = {"AP": round(ap, 4), "AP50": round(ap50, 4), "training_seconds": round(seconds), "road": engine}
    content = {**summary, "machine": machine, "versions": versions()}
    (folder / "result.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nAP {ap:.3f}, AP50 {ap50:.3f} after {seconds:.0f} s of training ({engine}). Results in {folder}:")
    for name, content in [
        ("predictions.png", "predicted and true boxes side by side"),
        ("result.json", "the figures above, machine and versions"),
        ("run", "checkpoint, metrics, log, all predictions in COCO's format"),
        ("shapes", "the data"),
    ]:
        print(f"  {name:<16} {content}")


def cpu_name():
    """The processor's name on Linux, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
