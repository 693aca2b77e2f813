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
from PIL import Image, ImageDraw

from dino.inference.drawing import draw_detections
from dino.utils.files import free_name

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "projects/dino/configs/dino_r18_shapes.py"
PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "pycocotools")
# The recipe as arguments of plain_train.py, which reads no recipes. A test compares the two networks.
PLAIN_SETTINGS = shlex.split("--size 160 --embed-dim 64 --layers 3 --queries 50 --epochs 6 --lr 4e-4")
SCALE, GAP = 3, 10  # of the drawn images: enlargement, and pixels between them


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


def draw_boxes(image, objects, names):
    """An enlarged copy of the image with its objects: (label, box xywh, score or None) each."""
    canvas = image.resize((image.width * SCALE, image.height * SCALE))
    boxes = [[SCALE * value for value in (x, y, x + w, y + h)] for _, (x, y, w, h), _ in objects]
    labels = [label for label, _, _ in objects]
    texts = [names[label] if score is None else f"{names[label]} {score:.2f}" for label, _, score in objects]
    return draw_detections(canvas, boxes, labels, texts)


def draw_pairs(val, folder, results, target, count=3, threshold=0.5):
    """Draw predictions on the left and the truth on the right, for validation images with 5 objects or more."""
    truth = json.loads(val.read_text())
    labels = {c["id"]: label for label, c in enumerate(truth["categories"])}
    names = [c["name"] for c in truth["categories"]]
    found = [r for r in json.loads(results.read_text()) if r["score"] >= threshold]
    sides = [by_image(truth["images"], entries, labels) for entries in (found, truth["annotations"])]
    chosen = [image for image in truth["images"] if len(sides[1][image["id"]]) >= 5][:count]
    rows = []
    for entry in chosen:
        image = Image.open(folder / entry["file_name"]).convert("RGB")
        rows.append([draw_boxes(image, side[entry["id"]], names) for side in sides])
    arrange(rows, [f"predicted, score of {threshold} or more", "true"]).save(target)


def arrange(rows, titles):
    """One image of rows of equally large images, with a title above each column."""
    width, height = rows[0][0].size
    page = Image.new("RGB", (len(titles) * (width + GAP) - GAP, len(rows) * (height + GAP) + 2 * GAP), "white")
    for x, title in enumerate(titles):
        ImageDraw.Draw(page).text((x * (width + GAP) + 8, 4), title, fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image, (x * (width + GAP), y * (height + GAP) + 2 * GAP))
    return page


def by_image(images, entries, labels):
    """(label, box xywh, score or None) of COCO-format entries, by image id."""
    objects = {image["id"]: [] for image in images}
    for entry in entries:
        objects[entry["image_id"]].append((labels[entry["category_id"]], entry["bbox"], entry.get("score")))
    return objects


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
