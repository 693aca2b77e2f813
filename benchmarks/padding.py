"""What padding in a batch changes.

    python benchmarks/padding.py model.pth --val-json val.json --val-images images --output results.json

Every picture of a data set runs alone, then in canvases that are larger than it by the given shares, as in a batch with
a larger picture: zeros at the right and at the bottom, with the padding mask. AP of each, and how many detections of
the picture alone (scores from 0.05) are found again: equal label, IoU of at least 0.9. The mask keeps padding out of
attention and selection, not out of the convolutions' borders and the statistics of GroupNorm.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import origin  # noqa: E402

from dino.evaluation.average_precision import evaluate, to_results  # noqa: E402
from dino.export.export_wrapper import describe, prepare  # noqa: E402
from dino.export.verify import _match, pictures, read_data, run_network  # noqa: E402
from dino.inference.tiling import scale  # noqa: E402
from dino.utils.files import write_whole  # noqa: E402
from dino.weights.description import detector_from_checkpoint  # noqa: E402

SHARES = (1.0, 1.05, 1.25, 1.5, 2.0)  # of both sides of a picture


def padded(inputs, share):
    """One prepared image in a canvas whose sides are `share` times as long."""
    height, width = (round(side * share) for side in inputs.images.shape[2:])
    images = np.zeros((1, 3, height, width), np.uint8)
    images[:, :, : inputs.images.shape[2], : inputs.images.shape[3]] = inputs.images
    return inputs._replace(images=images)


def measure(detector, source, shares):
    """Share -> figures."""
    results, differences = {share: [] for share in shares}, {share: [] for share in shares}
    resize = describe(detector.names, [], detector.preprocessing, None)["resize"]
    for picture in pictures(source, detector.preprocessing.input_range):
        inputs = prepare(picture.pixels, resize)
        alone = run_network(detector, inputs)
        for share in shares:
            found = run_network(detector, padded(inputs, share))
            differences[share] += _match(alone, found)
            scaled = scale(found, inputs.sizes[0].tolist(), picture.pixels.shape[:2])
            results[share] += to_results(scaled, picture.image_id, source.category_ids)
    return {share: summarise(source, results[share], differences[share]) for share in shares}


def summarise(source, results, differences):
    same = [pair for pair in differences if pair]
    boxes, scores = zip(*same, strict=True)
    return {
        "AP": evaluate(source.data, results)["AP"],
        "detections": len(differences),
        "found_again": len(same),
        "box_pixels_median": statistics.median(boxes),
        "box_pixels_95_percent": float(np.quantile(boxes, 0.95)),
        "box_pixels_largest": max(boxes),
        "score_median": statistics.median(scores),
        "score_largest": max(scores),
    }


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--val-json", type=Path, required=True)
    parser.add_argument("--val-images", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="how many, at most (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    return parser


@torch.no_grad()
def main(argv=None):
    args = build_parser().parse_args(argv)
    detector = detector_from_checkpoint(args.checkpoint).eval()
    source = read_data(args.val_json, args.val_images, detector.names, args.images)
    found = measure(detector, source, SHARES)
    result = {"origin": origin(torch.device("cpu")), "images": len(source), "shares_of_the_sides": found}
    write_whole(args.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    for share, figures in found.items():
        print(share, "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
