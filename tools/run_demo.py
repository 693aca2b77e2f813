"""The demonstration: data, training, evaluation and a picture, from nothing, on a CPU or a GPU.

    make demo          (or, in an environment that is set up: python tools/run_demo.py)

With Detectron2 it runs tools/lazyconfig_train_net.py, without it tools/plain_train.py: same network, data and metrics.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from dino.data.coco import classes_of, read_annotations
from dino.inference.drawing import colour_of, draw_boxes, draw_text, tile_images
from dino.utils.files import free_name

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "projects/dino/configs/dino_r18_shapes.py"
PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "pycocotools")
# What the recipe says, for the program that reads no recipes; a test compares the two networks.
PLAIN_SETTINGS = shlex.split("--size 160 --embed-dim 64 --layers 3 --queries 50 --epochs 6 --lr 4e-4")
SCALE = 3  # of the images in the picture


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
    times = [m["time"] for m in metrics if "time" in m]  # of single iterations, medians since the line before
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


def draw_side(image, objects, names):
    """A copy of the image, SCALE times as large, with (label, box xywh, score or None) drawn."""
    large = image.resize((image.width * SCALE, image.height * SCALE))
    boxes = [[SCALE * x, SCALE * y, SCALE * (x + w), SCALE * (y + h)] for _, (x, y, w, h), _ in objects]
    texts = [names[label] if score is None else f"{names[label]} {score:.2f}" for label, _, score in objects]
    return draw_boxes(large, boxes, [colour_of(label) for label, _, _ in objects], texts, width=SCALE)


def draw_pairs(val, folder, results, target, count=4, threshold=0.3):
    """Predictions on the left, truth on the right, for the first validation images with 5 objects or more."""
    truth = read_annotations(val, folder)
    classes = classes_of(truth)
    objects, predictions = defaultdict(list), defaultdict(list)
    for a in truth["annotations"]:
        objects[a["image_id"]].append((classes.labels[a["category_id"]], a["bbox"], None))
    for r in json.loads(results.read_text()):
        if r["score"] >= threshold:
            predictions[r["image_id"]].append((classes.labels[r["category_id"]], r["bbox"], r["score"]))
    chosen = [image for image in truth["images"] if len(objects[image["id"]]) >= 5][:count]
    pictures = []
    for entry in chosen:
        image = Image.open(folder / entry["file_name"]).convert("RGB")
        pictures += [draw_side(image, side[entry["id"]], classes.names) for side in (predictions, objects)]
    pairs = tile_images(pictures, columns=2, gap=10)
    sheet = Image.new("RGB", (pairs.width, pairs.height + 20), "white")
    sheet.paste(pairs, (0, 20))
    draw_text(sheet, (8, 2), f"predicted, score of {threshold} or more")
    draw_text(sheet, (pairs.width // 2 + 13, 2), "true")
    sheet.save(target)


def versions():
    """Versions of the packages that matter, None where one is missing."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output/demo", help="folder of the results")
    args = parser.parse_args(argv)
    folder = args.output.resolve()
    move_aside(folder)
    folder.mkdir(parents=True)
    shapes = folder / "shapes"
    call("make_shapes.py", shapes)
    data = []
    for split in ("train", "val"):
        data += [f"--{split}-json", shapes / f"{split}.json", f"--{split}-images", shapes / split]
    road = "detectron2" if importlib.util.find_spec("detectron2") else "plain"
    ap, ap50, seconds, results = (train_with_detectron2 if road == "detectron2" else train_plain)(folder, data)
    draw_pairs(shapes / "val.json", shapes / "val", results, folder / "predictions.png")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu}
    summary = {"AP": round(ap, 4), "AP50": round(ap50, 4), "training_seconds": round(seconds), "road": road}
    content = {**summary, "machine": machine, "versions": versions()}
    (folder / "result.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nAP {ap:.3f}, AP50 {ap50:.3f} after {seconds:.0f} s of training ({road}). Everything lies in {folder}:")
    for name, what in [
        ("predictions.png", "predicted and true boxes side by side"),
        ("result.json", "the figures above, machine and versions"),
        ("run", "checkpoint, metrics, log, all predictions in COCO's format"),
        ("shapes", "the data"),
    ]:
        print(f"  {name:<16} {what}")


def cpu_name():
    """What Linux calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
