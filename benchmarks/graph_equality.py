"""Compares exported graphs with the network on random pairs of picture sizes and batch size.

    python benchmarks/graph_equality.py --output results.json [--checkpoint model.pth --images FOLDER]

Without a checkpoint, the network is a small DINO on a ResNet-18 with random weights, and pictures are blurred noise.
Half of the batches have a delicate size: pictures in them end at the pixels where a mask by float32 division would be
wrong (see `dino/export/verify_batches.py`). The engines: PyTorch with the compiled operator, torch.export, ONNX Runtime
and OpenVINO (float32) with one graph for all sizes, and TorchScript with a trace for every third pair.

The graphs return the boxes and scores of all queries, and the tokens selected for them. Where an engine selects others
than plain PyTorch, the two tokens must score the same to 1e-4, and plain PyTorch runs once more with the tokens of
the engine: all boxes and scores of all pairs are compared for equal tokens.
"""

import argparse
import io
import json
import math
import sys
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import origin, version_of  # noqa: E402

from dino.data.images import IMAGE_SUFFIXES, read_image, resize_image  # noqa: E402
from dino.export.export_checkpoint import exportable  # noqa: E402
from dino.export.export_formats import FORMATS, write  # noqa: E402
from dino.export.export_wrapper import ExportWrapper, Fixed  # noqa: E402
from dino.export.verify_batches import cells_of, delicate_ends, network_strides  # noqa: E402
from dino.layers import deform_attn_implementation  # noqa: E402
from dino.layers.boxes import cxcywh_to_xyxy  # noqa: E402
from dino.layers.ops import operator  # noqa: E402
from dino.modeling import TorchvisionBackbone  # noqa: E402
from dino.modeling.assembly import build_dino  # noqa: E402
from dino.modeling.detector import Detector  # noqa: E402
from dino.modeling.variants import DistinctSelection  # noqa: E402
from dino.utils.files import write_whole  # noqa: E402
from dino.weights.description import detector_from_checkpoint  # noqa: E402

BOX_BOUND, SCORE_BOUND, TIE_BOUND = 0.01, 1e-4, 1e-4  # pixels; probability; logits of two tokens
LARGEST_BATCH = 4
TRACED, TRACE_EVERY = "TorchScript", 3  # each trace is for one size, and takes as long as all other engines
NAMES = ("boxes", "scores", "labels")


class AllQueries(nn.Module):
    """An `ExportWrapper` of all queries: their boxes (B, Q, 4) in pixels, scores (B, Q, C) and tokens (B, Q)."""

    def __init__(self, wrapper):
        super().__init__()
        self.detector = wrapper.detector
        self.selection = self.detector.network.query_selection
        self.best_tokens, self.scores = self.selection.best_tokens, self.selection.scores
        self.selection.best_tokens, self.selection.scores = self.select, self.score
        self.fed = None  # tokens to use in place of the best
        self.seen = {}

    def select(self, *arguments):
        own = self.best_tokens(*arguments)
        self.seen["tokens"] = own if self.fed is None else self.fed
        return self.seen["tokens"]

    def score(self, *arguments):
        scores = self.scores(*arguments)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self.seen["scores"] = scores
        return scores

    def forward(self, images, sizes):
        predictions = self.detector.network(*self.detector.pad(images, sizes)).decoder
        tokens = self.seen.pop("tokens")
        scale = sizes.flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4)
        return cxcywh_to_xyxy(predictions.boxes[-1]) * scale, predictions.logits[-1].sigmoid(), tokens


def random_detector():
    """A small DINO whose heads are no longer zero, so that boxes depend on everything before them."""
    torch.manual_seed(0)
    backbone = TorchvisionBackbone("resnet18")
    sizes = {"embed_dim": 64, "num_heads": 4, "hidden_dim": 128, "encoder_layers": 2, "decoder_layers": 2}
    network = build_dino(backbone=backbone, num_classes=5, num_queries=60, **sizes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return Detector(network, names=list("abcde"))


def read_pictures(folder, random):
    """Pictures (h, w, 3) uint8 to resize: of a folder, or blurred noise."""
    if folder is None:
        small = torch.from_numpy(random.integers(0, 256, (8, 3, 12, 16)).astype(np.float32))
        large = F.interpolate(small, size=(240, 320), mode="bilinear").permute(0, 2, 3, 1).numpy()
        return [*(large + random.normal(0, 12, large.shape)).clip(0, 255).astype(np.uint8)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return [read_image(path) for path in paths[:16]]


def draw(count, lowest, highest, cells, random):
    """`count` batches: whether delicate, canvas (H, W), sizes of the pictures."""
    sides = range(lowest, highest + 1)
    delicate = {side: ends for side in sides if (ends := all_ends(side, cells))}
    drawn = []
    for number in range(count):
        batch = int(random.integers(1, LARGEST_BATCH + 1))
        if number % 2:
            canvas = [int(random.choice([*delicate])) for _ in range(2)]
            ends = [random.choice(delicate[side], batch) + random.integers(0, 2, batch) for side in canvas]
        else:
            canvas = [int(random.integers(lowest, highest + 1)) for _ in range(2)]
            ends = [random.integers(side // 3, side + 1, batch) for side in canvas]
        sizes = np.stack(ends, 1).astype(np.int64)
        if batch > 1:
            sizes[0] = canvas
        drawn.append((bool(number % 2), tuple(canvas), sizes))
    return drawn


def all_ends(side, cells):
    """Delicate pixels of all levels."""
    return sorted({end for count in cells(side) for end in delicate_ends(side, count)})


def fill(canvas, sizes, pictures, random):
    """The inputs of a graph: images (B, 3, H, W) uint8, and sizes."""
    images = np.zeros((len(sizes), 3, *canvas), np.uint8)
    for part, (height, width) in zip(images, sizes.tolist(), strict=True):
        picture = pictures[random.integers(len(pictures))]
        part[:, :height, :width] = resize_image(picture, (height, width)).transpose(2, 0, 1)
    return images, sizes


def openvino_runner(content):
    """Run an ONNX file of any size in OpenVINO, in float32."""
    import openvino

    model = openvino.Core().read_model(io.BytesIO(content))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images, sizes):
        results = compiled({"images": images, "sizes": sizes})
        return [np.array(results[name]) for name in NAMES]

    return run


def make_engines(detector, wrapper):
    """Name -> function of images and sizes, for the engines that are installed."""
    engines = {}
    if operator.verdict(torch.device("cpu")).usable:
        engines["PyTorch, compiled operator"] = lambda *inputs: run_torch(wrapper, "compiled", *inputs)
    program = write("torch-export", exported(detector), None, {})
    engines["torch.export"] = FORMATS["torch-export"].run(program)
    onnx = write("onnx", exported(detector), None, {})
    engines["ONNX Runtime"] = FORMATS["onnx"].run(onnx)
    if version_of("openvino"):
        engines["OpenVINO, float32"] = openvino_runner(onnx)
    traced = exported(detector)
    engines[TRACED] = lambda *inputs: run_torchscript(traced, *inputs)
    return engines


def exported(detector):
    """The network of a graph: a copy with its norms folded."""
    return AllQueries(exportable(detector)).eval()


@torch.no_grad()
def run_torch(wrapper, implementation, images, sizes):
    with deform_attn_implementation(implementation):
        return [x.numpy() for x in wrapper(torch.from_numpy(images), torch.from_numpy(sizes))]


def run_torchscript(wrapper, images, sizes):
    """Trace for the size of these inputs, and run."""
    content = write("torchscript", wrapper, Fixed(len(images), *images.shape[2:]), {})
    return FORMATS["torchscript"].run(content)(images, sizes)


def compare(wrapper, expected, found, inputs):
    """Largest differences for equal tokens, and how far the scores of other tokens are from those expected."""
    (boxes, scores, tokens), rows = found, torch.from_numpy(expected[2])
    moved = (tokens != expected[2]).any(1)
    tie = 0.0
    if moved.any():
        ranked = wrapper.seen["scores"]  # (B, S), of the expected run
        gaps = ranked.gather(1, rows) - ranked.gather(1, torch.from_numpy(tokens))
        tie = gaps.nan_to_num(0).abs().max().item()
        wrapper.fed = torch.from_numpy(tokens)
        expected = run_torch(wrapper, "reference", *inputs)
        wrapper.fed = None
        run_torch(wrapper, "reference", *inputs)  # the scores again, for other engines
    box, score = (float(np.abs(a - b).max()) for a, b in ((boxes, expected[0]), (scores, expected[1])))
    return {"box": box, "score": score, "other_tokens": int(moved.sum()), "tie": tie}


def measure(wrapper, engines, drawn, pictures, random):
    """Engine -> one row for each batch."""
    rows = {name: [] for name in engines}
    start = time.monotonic()
    for number, (delicate, canvas, sizes) in enumerate(drawn):
        inputs = fill(canvas, sizes, pictures, random)
        expected = run_torch(wrapper, "reference", *inputs)
        for name, run in engines.items():
            if name != TRACED or number % TRACE_EVERY == 0:
                row = compare(wrapper, expected, run(*inputs), inputs)
                rows[name].append({"delicate": delicate, "canvas": canvas, "sizes": sizes.tolist(), **row})
        if (number + 1) % 10 == 0:
            worst = {name: max(row["box"] for row in found) for name, found in rows.items()}
            print(f"{number + 1} pairs, {time.monotonic() - start:.0f} s: {worst}", flush=True)
    return rows


def summarise(found, tie_bound):
    """Largest differences of an engine, numbers of pictures, and the batches beyond the bounds."""
    bounds = {"box": BOX_BOUND, "score": SCORE_BOUND, "tie": tie_bound}
    return {
        "pairs": len(found),
        "pictures": sum(len(row["sizes"]) for row in found),
        "batch_sizes": dict(sorted(Counter(len(row["sizes"]) for row in found).items())),
        "delicate_pairs": sum(row["delicate"] for row in found),
        "largest_box_difference_pixels": max(row["box"] for row in found),
        "largest_score_difference": max(row["score"] for row in found),
        "pictures_with_other_tokens": sum(row["other_tokens"] for row in found),
        "largest_difference_of_tied_logits": max(row["tie"] for row in found),
        "beyond_the_bounds": [row for row in found if not all(row[key] <= bounds[key] for key in bounds)],
    }


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--checkpoint", type=Path, help="a trained model (default: random weights)")
    parser.add_argument("--images", type=Path, help="folder of pictures (default: noise)")
    parser.add_argument("--pairs", type=int, default=300, help="number of batches (default %(default)s)")
    parser.add_argument("--largest-side", type=int, default=640, help="of a batch, in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    random = np.random.default_rng(args.seed)
    detector = (detector_from_checkpoint(args.checkpoint) if args.checkpoint else random_detector()).eval()
    strides = network_strides(detector.network)
    drawn = draw(args.pairs, strides[-1] + 1, args.largest_side, cells_of(detector.network, strides), random)
    pictures = read_pictures(args.images, random)
    engines = make_engines(detector, wrapper := AllQueries(ExportWrapper(deepcopy(detector))).eval())
    rows = measure(wrapper, engines, drawn, pictures, random)
    # DistinctSelection takes tokens by the overlap of their boxes, too: not the highest scores alone.
    tie_bound = math.inf if isinstance(detector.network.query_selection, DistinctSelection) else TIE_BOUND
    results = {name: summarise(found, tie_bound) for name, found in rows.items()}
    result = {
        "origin": origin(torch.device("cpu")),
        "packages": {package: version_of(package) for package in ("onnx", "onnxruntime", "onnxscript", "openvino")},
        "network": args.checkpoint.name if args.checkpoint else "ResNet-18, width 64, 2 + 2 layers, random weights",
        "bounds": {"box_pixels": BOX_BOUND, "score": SCORE_BOUND, "tied_logits": str(tie_bound)},
        "results": results,
    }
    write_whole(args.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    for name, figures in results.items():
        print(name, {key: value for key, value in figures.items() if key != "beyond_the_bounds"})
    if any(figures["beyond_the_bounds"] for figures in results.values()):
        sys.exit("some batches are beyond the bounds, see the file")


if __name__ == "__main__":
    main()
