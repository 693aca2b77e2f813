"""Time per picture of the C++ example beside PyTorch on a CPU, one size, one picture at a time.

    python benchmarks/cpp_cpu.py model.pth --program mine.pt2 --package mine_package.pt2 --detect build/detect \\
        --image photo.jpg --threads 1 --output benchmarks/results/cpp_cpu_1thread.json

`--program` is a file of `dino export --size`, `--package` the same compiled by projects/dino/cpp/make_package.py.
Contenders take turns for `--rounds` rounds of `--repeat` runs; each round gives the median of its runs, the result is
the median of the rounds. All of them run the network with its choice of detections on the same resized picture; reading
and resizing do not count. `eager` is the network of `dino predict` (folded norms, oneDNN, the compiled attention
operator where it is built), `compiled` the same under torch.compile, `program` the exported file run by torch.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from measure import origin
from PIL import Image

from dino import Predictor
from dino.data.images import read_image
from dino.export.export_wrapper import ExportWrapper, Prepared, prepare
from dino.utils.files import write_whole


def load_contenders(args, inputs):
    """Name -> function that runs once, or None: then it is `detect`."""
    eager = ExportWrapper(Predictor(args.checkpoint, device="cpu").detector)
    compiled = ExportWrapper(Predictor(args.checkpoint, device="cpu").detector)
    torch._dynamo.config.recompile_limit = 64
    compiled.detector.network.compile(dynamic=False)
    program = torch.export.load(args.program).module()
    runners = {"eager": eager, "compiled": compiled, "program": program}
    return {name: lambda run=run: run(*inputs) for name, run in runners.items()} | {"C++": None}


def time_here(run, repeat):
    """Median milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def time_detect(args, picture):
    """Median milliseconds, as `detect` prints them."""
    words = [args.detect, args.package, picture, str(args.repeat)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return float(re.fullmatch(r"([\d.]+) milliseconds\n", result.stderr)[1])


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--detect", type=Path, required=True, help="the C++ program")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=10, help="runs of a contender in a round")
    parser.add_argument("--output", type=Path, required=True)
    return parser


@torch.inference_mode()
def main(argv=None):
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    files = {"dino.json": ""}
    torch.export.load(args.program, extra_files=files)
    pixels = read_image(args.image)
    inputs = Prepared(*map(torch.from_numpy, prepare(pixels, json.loads(files["dino.json"])["resize"])))
    runners = load_contenders(args, inputs)
    for run in filter(None, runners.values()):
        time_here(run, 2)  # compiles
    times = {name: [] for name in runners}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.ppm")
        Image.fromarray(pixels).save(picture)
        for _ in range(args.rounds):
            for name, run in runners.items():
                times[name].append(time_here(run, args.repeat) if run else time_detect(args, picture))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {"origin": origin(torch.device("cpu")), "threads": args.threads, "size": list(inputs.images.shape[2:])}
    result |= {"milliseconds": medians, "rounds": times}
    write_whole(args.output, lambda part: part.write_text(json.dumps(result, indent=1)))
    for name, value in medians.items():
        print(f"{name:>10} {value:8.1f} ms, {medians['eager'] / value:.2f} times as fast as eager")


if __name__ == "__main__":
    main()
