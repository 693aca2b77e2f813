"""AP with boxes as predicted, as the official program computes it, and with boxes clipped to the images.

    python benchmarks/clipping.py model_best.pth val.json images --results benchmarks/results/clipping.json

Detects once, with every score, then evaluates the same detections twice. Boxes that are empty after clipping are
dropped, as by Detectron2's `detector_postprocess`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import origin  # noqa: E402

from dino import Predictor  # noqa: E402
from dino.data.coco import read_annotations  # noqa: E402
from dino.evaluation.average_precision import evaluate  # noqa: E402
from dino.inference.tiling import clip  # noqa: E402


def crossing(found):
    """How many boxes cross a border of the picture by more than a hundredth of a pixel."""
    inside = clip(found.detections, found.image_size)
    return int(((found.boxes - inside.boxes).abs().amax(1) > 0.01).sum())


def compare(predictor, data, folder):
    """Counts of boxes and both rows of AP."""
    counts = {"boxes": 0, "crossing a border": 0, "empty when clipped": 0}
    results = {"unclipped": [], "clipped": []}
    paths = [folder / image["file_name"] for image in data["images"]]
    found = tqdm(predictor.stream(paths), total=len(paths), unit="image", disable=None)
    for image, one in zip(data["images"], found, strict=True):
        inside = one.clip()
        counts["boxes"] += len(one)
        counts["crossing a border"] += crossing(one)
        counts["empty when clipped"] += len(one) - len(inside)
        for kind, detections in (("unclipped", one), ("clipped", inside)):
            results[kind] += detections.to_coco(image_id=image["id"])
    return {"counts": counts, "AP": {kind: evaluate(data, rows) for kind, rows in results.items()}}


def build_parser():
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="trained on the classes of the annotations, in their order of ids")
    parser.add_argument("annotations", type=Path, help="in COCO format")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("--model", default="", help="what the result calls the model")
    parser.add_argument("--results", type=Path, default=Path("output/clipping.json"), help="the JSON file to write")
    return parser


def main():
    """Detect, evaluate, report."""
    options = build_parser().parse_args()
    predictor = Predictor(options.checkpoint, device="cpu", score_thresh=0)
    data = read_annotations(options.annotations, options.images)
    report = {**origin(torch.device("cpu")), "model": options.model, "annotations": options.annotations.name}
    report |= compare(predictor, data, options.images)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"counts": report["counts"], "AP": report["AP"]}, indent=1))


if __name__ == "__main__":
    main()
