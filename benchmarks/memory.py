"""Memory of a process over thousands of predictions, and its slope with a 95 % interval.

    python benchmarks/memory.py --predictions 3000 --threads 1 --results benchmarks/results/memory_cpu.json

A ResNet-18 DINO with fused operations of oneDNN and random weights; each picture has one of 40 sizes, at random.
Some kB are kept for every new size, so that memory grows as long as new sizes come (`--sizes 0`).
A straight line is fitted to samples of the bytes that the C library has given out (tensors, and caches below Python),
and to samples of the resident memory, after freed memory was given back to the system. The latter has steps of some MB,
up and down, where blocks in use lie between free ones.
"""

import argparse
import ctypes
import gc
import json
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import memory_in_use, origin  # noqa: E402

from dino import Predictor  # noqa: E402
from dino.inference.cpu import prepare_for_cpu  # noqa: E402
from dino.modeling import TorchvisionBackbone, build_dino  # noqa: E402
from dino.modeling.detector import Detector, Preprocessing  # noqa: E402

_T_95 = 2.0  # of Student's distribution, for 30 samples and more


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _names = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    _fields_ = tuple(zip(_names, [ctypes.c_size_t] * len(_names), strict=True))


class Line(NamedTuple):
    """A straight line through samples."""

    slope: float  # bytes for each prediction
    margin: float  # half of the 95 % interval


def bytes_now():
    """Bytes that the C library has given out, None where it can't say, and bytes in memory without the free ones."""
    gc.collect()
    libc = ctypes.CDLL(None)
    given = None
    if platform.libc_ver()[0] == "glibc" and hasattr(libc, "mallinfo2"):
        libc.malloc_trim(0)
        libc.mallinfo2.restype = _Mallinfo
        found = libc.mallinfo2()
        given = found.uordblks + found.hblkhd
    return given, memory_in_use("VmRSS")


def fit(numbers, values):
    """Least squares; the margin takes the residuals for independent."""
    x, y = np.asarray(numbers, float), np.asarray(values, float)
    slope, start = np.polyfit(x, y, 1)
    rest = y - (slope * x + start)
    error = math.sqrt((rest**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return Line(float(slope), _T_95 * error)


def pictures(number, seed, sizes=None, low=48, high=160):
    """Noise of random sizes in pixels, a new one for each prediction, or one of `sizes`."""
    draw = np.random.default_rng(seed)
    for _ in range(number):
        height, width = draw.integers(low, high, 2) if sizes is None else sizes[draw.integers(len(sizes))]
        yield draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(predictor, predictions, every, warm_up, threads=1, sizes=None):
    """Predict -> the numbers of predictions after the warm-up, and `bytes_now` after each."""
    seeds, numbers, values = count(), [], []

    def work(share):
        for picture in pictures(share, next(seeds), sizes):
            predictor(picture)

    with ThreadPoolExecutor(threads) as pool:

        def run(total):
            list(pool.map(work, [total // threads + (n < total % threads) for n in range(threads)]))

        run(warm_up)
        for number in range(0, predictions + 1, every):
            if number:
                run(every)
            numbers.append(number)
            values.append(bytes_now())
    return numbers, values


def small_predictor():
    """Predicts a picture of any size in some hundredths of a second."""
    torch.manual_seed(0)
    features = ["res3", "res4", "res5"]
    network = build_dino(
        backbone=TorchvisionBackbone("resnet18", out_features=features),
        in_features=features,
        num_classes=3,
        num_queries=30,
        embed_dim=64,
        hidden_dim=128,
        encoder_layers=2,
        decoder_layers=2,
    ).eval()
    prepare_for_cpu(network)
    preprocessing = Preprocessing(short_side=64, max_size=128, max_detections=30)
    return Predictor(Detector(network, preprocessing, ["a", "b", "c"]).eval(), score_thresh=0)


def build_parser():
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=3000, help="after the warm-up (default 3000)")
    parser.add_argument("--every", type=int, default=50, help="predictions from sample to sample (default 50)")
    parser.add_argument("--warm-up", type=int, default=500, help="predictions before the first sample (default 500)")
    parser.add_argument("--threads", type=int, default=1, help="that predict at once (default 1)")
    parser.add_argument("--sizes", type=int, default=40, help="of pictures; 0 for new ones all the time (default 40)")
    parser.add_argument("--results", type=Path, default=Path("output/memory.json"), help="the JSON file to write")
    return parser


def main():
    """Predict, fit, report."""
    options = build_parser().parse_args()
    torch.set_num_threads(1)
    report = origin(torch.device("cpu"))
    sizes = [x.shape[:2] for x in pictures(options.sizes, 1)] if options.sizes else None
    counts = options.predictions, options.every, options.warm_up, options.threads
    numbers, values = sample(small_predictor(), *counts, sizes)
    report |= {
        "sizes": options.sizes or "new ones",
        "predicting_threads": options.threads,
        "warm_up": options.warm_up,
        "numbers": numbers,
    }
    for name, column in zip(("given out", "resident"), zip(*values, strict=True), strict=True):
        if None not in column:
            line = fit(numbers, column)
            report[name] = {"bytes_per_prediction": line.slope, "margin_95": line.margin, "bytes": column}
            print(f"{name}: {line.slope:.0f} +- {line.margin:.0f} bytes for each of {options.predictions} predictions")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
