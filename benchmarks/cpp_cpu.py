"""Time per picture of the C++ example beside PyTorch on a CPU: one size, one picture at a time.

    python benchmarks/cpp_cpu.py model.pth --package package --detect build/detect --size 288 384 \\
        --image photo.jpg --threads 1 --output benchmarks/results/cpp_cpu_1thread.json

`--package` is a folder that projects/dino/cpp/make_package.py wrote for this checkpoint and size. Contenders take turns
for `--rounds` rounds of `--repeat` runs: each round gives the median of its runs, the result is the median of the
rounds. All run the network with its choice of detections on the same resized picture; reading and resizing do not
count. `eager` is the network as `dino predict` runs it (folded norms, oneDNN, the compiled attention operator where it
is built), `compiled` the same under torch.compile for this size. On a shared machine, trust processor time.
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


def load_contenders(checkpoint, inputs):
    """Name -> function that runs once."""
    eager, compiled = (ExportWrapper(Predictor(checkpoint, device="cpu").detector) for _ in range(2))
    compiled.detector.network.compile(dynamic=False)
    return {"eager": lambda: eager(*inputs), "compiled": lambda: compiled(*inputs)}


def time_here(run, repeat):
    """Median milliseconds: wall, processor."""
    times = []
    for _ in range(repeat):
        start, processor = time.perf_counter(), time.process_time()
        run()
        times.append((1000 * (time.perf_counter() - start), 1000 * (time.process_time() - processor)))
    return [statistics.median(column) for column in zip(*times, strict=True)]


def time_detect(args, picture):
    """The same of the C++ program, as it prints them."""
    words = [args.detect, args.package, picture, str(args.repeat)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return [float(number) for number in re.findall(r"([\d.]+) ms", result.stderr)]


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--detect", type=Path, required=True, help="the C++ program")
    parser.add_argument("--size", nargs=2, type=int, required=True, help="height and width of the package")
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
    pixels = read_image(args.image)
    inputs = Prepared(*map(torch.from_numpy, prepare(pixels, {"fit": args.size})))
    runners = load_contenders(args.checkpoint, inputs)
    for run in runners.values():
        time_here(run, 3)  # compiles
    times = {name: [] for name in (*runners, "C++")}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.ppm")
        Image.fromarray(pixels).save(picture)
        for _ in range(args.rounds):
            for name, run in runners.items():
                times[name].append(time_here(run, args.repeat))
            times["C++"].append(time_detect(args, picture))
    found = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    result = {"origin": origin(torch.device("cpu")), "threads": args.threads, "size": args.size}
    result["milliseconds"] = {name: dict(zip(("wall", "processor"), row, strict=True)) for name, row in found.items()}
    result["rounds"] = times
    write_whole(args.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    for name, (wall, processor) in found.items():
        ratio = found["eager"][1] / processor
        print(f"{name:>10} {wall:8.1f} ms, {processor:.1f} ms of processor time: {ratio:.2f} times as fast as eager")


if __name__ == "__main__":
    main()
