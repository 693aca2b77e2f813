"""How time and memory grow with the work, beside what a count of operations says: `python benchmarks/growth.py`.

    python benchmarks/growth.py --rounds 3
    python benchmarks/growth.py --device cuda --curves 'image size'

A ResNet-18 DINO, float32, random weights. Each curve changes one thing of the same work: one image of 240x320 pixels
with 10 boxes, 900 queries, 4 levels. Times are medians; memory is what a run needs at most beyond what was in use.
`multiply_adds` are those of the forward pass. A backward pass has two products for each of its products, so they grow
alike. `bytes_counted` are those kept for the backward pass, or in inference the tensors of one encoder layer.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import MIB, clock, origin, peak_memory  # noqa: E402

from dino.inference.cpu import keep_freed_memory  # noqa: E402
from dino.layers import HungarianMatcher, SetCriterion  # noqa: E402
from dino.modeling import (  # noqa: E402
    TorchvisionBackbone,
    build_dino,
    network_cost,
)

FEATURES = ["res2", "res3", "res4", "res5"]
NUM_CLASSES = 80


class Point(NamedTuple):
    """The work of one measurement."""

    height: int = 240
    width: int = 320
    queries: int = 900
    boxes: int = 10  # per image
    batch: int = 1
    levels: int = 4


CURVES = {
    "image size": [Point(h, h * 4 // 3) for h in (192, 288, 384, 480)],
    "queries": [Point(queries=n) for n in (100, 500, 900)],
    "boxes per image": [Point(boxes=n) for n in (1, 10, 50, 100, 200, 500)],
    "batch": [Point(batch=n) for n in (1, 2, 4)],
    "levels": [Point(levels=n) for n in (4, 5)],
}
LABELS = {
    "image size": "{0.height}x{0.width}",
    "queries": "{0.queries}",
    "boxes per image": "{0.boxes}",
    "batch": "{0.batch}",
    "levels": "{0.levels}",
}


def build(point, device):
    """The network of a point; as in the paper, a fifth level is a finer one."""
    torch.manual_seed(0)
    features = FEATURES if point.levels == 5 else FEATURES[1:]
    backbone = TorchvisionBackbone("resnet18", out_features=features)
    sizes = {"num_levels": point.levels, "num_queries": point.queries}
    return build_dino(backbone=backbone, in_features=features, num_classes=NUM_CLASSES, **sizes).to(device)


def layer_bytes(network, point):
    """Float32 tensors of one encoder layer in inference: six of the tokens' size, and the numbers of each sample."""
    with network_cost.nothing_computed(network, training=False):
        images, padding = network_cost.empty_images(network, point.batch, point.height, point.width)
        batch, tokens, width = network.tokenize(network.neck(images), padding).features.shape
    attention = network.encoder.layers[0].attention
    samples = attention.num_heads * attention.num_levels * attention.num_points
    return 4 * batch * tokens * (6 * width + 3 * samples)


def measure(curve, point, work, options, device):
    """One row."""
    network, size = build(point, device), (point.batch, point.height, point.width)
    row = {"curve": curve, "value": LABELS[curve].format(point), "work": work}
    if work == "inference":
        run = network_cost.inference(network, *size)
        row["multiply_adds"] = network_cost.count_multiply_adds(network, *size)["total"]
        row["bytes_counted"] = layer_bytes(network, point)
    else:
        criterion = SetCriterion(matcher=HungarianMatcher())
        targets = network_cost.some_targets(point.batch, point.boxes, device)
        run = network_cost.training_step(network, criterion, *size, point.boxes)
        row["multiply_adds"] = network_cost.count_multiply_adds(network, *size, targets)["total"]
        row["bytes_counted"] = network_cost.count_activations(network, *size, targets)
    network.train(work == "training")
    run()
    times = []
    for _ in range(options.rounds):
        start = clock(device)
        run()
        times.append([end - begin for begin, end in zip(start, clock(device), strict=True)])
    wall, cpu = zip(*times, strict=True)
    network.zero_grad()
    before, peak, _ = peak_memory(run, device)
    row |= {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}
    return row | {"extra_bytes": None if peak is None else peak - before}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path, help="folder of the JSON file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--curves", default="", help="regular expression, such as 'batch|levels'")
    return parser.parse_args()


def main():
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as our programs do
    device = torch.device(options.device)
    report = {**origin(device), "rounds": options.rounds, "rows": []}
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"growth_{device.type}_{options.threads}threads.json"
    for curve, points in CURVES.items():
        works = ["training"] if curve == "boxes per image" else ["inference", "training"]
        for work in works if re.search(options.curves, curve) else []:
            for point in points:
                row = measure(curve, point, work, options, device)
                report["rows"].append(row)
                path.write_text(json.dumps(report, indent=1) + "\n")
                memory = "" if row["extra_bytes"] is None else f", {row['extra_bytes'] / MIB:.0f} MiB"
                print(f"{work}, {curve} {row['value']}: {row['seconds']:.3f} s{memory}", flush=True)


if __name__ == "__main__":
    main()
