"""AP, time and size of an exported model on a CPU, in float32 and with 8-bit integers, in ONNX Runtime.

    python benchmarks/export_cpu.py model.pth --val-json val.json --val-images images \\
        --train-json train.json --train-images images --size 240 320 --output results.json

`network` is the network in PyTorch with the operator that runs by default, `grid` and `gather` are the two ONNX forms.
The others quantise `grid` with ONNX Runtime's tools: `weights` its matrix products (weights beforehand, activations
while it runs), `convolutions` its convolutions with ranges measured on training images, `all` both kinds with such
ranges. Images run one by one; every round runs each of them once per contender, times are medians. A form that ONNX
Runtime can't run is named in the results with what it says.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import onnx
import onnxruntime
import torch
from measure import origin
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
    shape_inference,
)

from dino.evaluation.average_precision import evaluate, to_results
from dino.export.export_checkpoint import exportable
from dino.export.export_formats import run_onnx, write
from dino.export.export_wrapper import Fixed, describe, prepare
from dino.export.verify import pictures, read_data, run_exported, run_network
from dino.inference.tiling import scale
from dino.utils.files import write_whole
from dino.weights.description import detector_from_checkpoint

MATRIX, CONVOLUTION = ["MatMul", "Gemm"], ["Conv"]


class Calibration(CalibrationDataReader):
    """Training images, one by one."""

    def __init__(self, inputs):
        self.feeds = iter([{"images": x.images, "sizes": x.sizes} for x in inputs])

    def get_next(self):
        return next(self.feeds, None)


def quantised(content, calibration):
    """Name -> bytes of each quantised form."""
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / name for name in ("source.onnx", "ready.onnx", "target.onnx"))
        source.write_bytes(content)
        shape_inference.quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantize_dynamic(ready, target, op_types_to_quantize=MATRIX, weight_type=QuantType.QInt8)
        made = {"weights": target.read_bytes()}
        for name, operators in (("convolutions", CONVOLUTION), ("all", [*CONVOLUTION, *MATRIX])):
            reader = Calibration(calibration)
            per_channel = operators == CONVOLUTION  # ONNX Runtime refuses to run some products with it
            options = {"per_channel": per_channel, "weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
            options["nodes_to_exclude"] = products_of_activations(ready)
            quantize_static(ready, target, reader, op_types_to_quantize=operators, **options)
            made[name] = target.read_bytes()
    return made


def products_of_activations(path):
    """Names of the matrix products that have no weights: those of the self-attention among queries."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]


def find_runners(files, fixed, inputs):
    """Name -> function, of the programs that ONNX Runtime can run; name -> what it says, of the others."""
    runners, refused = {}, {}
    for name, content in files.items():
        try:
            runners[name] = functools.partial(run_exported, run_onnx(content), fixed=fixed)
            runners[name](inputs)
        except Exception as error:  # its exceptions have no common class
            runners.pop(name, None)
            refused[name] = {"refused": str(error).splitlines()[0][:300]}
    return runners, refused


def measure(runners, source, resize):
    """Name -> AP and median time, from one run per image and contender."""
    times = {name: [] for name in runners}
    results = {name: [] for name in runners}
    for picture in pictures(source):
        inputs = prepare(picture.pixels, resize)
        for name, run in runners.items():
            start = time.perf_counter()
            found = run(inputs)
            times[name].append(1000 * (time.perf_counter() - start))
            scaled = scale(found, inputs.sizes[0].tolist(), picture.pixels.shape[:2])
            results[name] += to_results(scaled, picture.image_id, source.category_ids)
    return {
        name: {
            "AP": evaluate(source.data, results[name])["AP"],
            "milliseconds": statistics.median(times[name][1:]),
        }
        for name in runners
    }


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--val-json", type=Path, required=True)
    parser.add_argument("--val-images", type=Path, required=True)
    parser.add_argument("--train-json", type=Path, required=True, help="to measure ranges on")
    parser.add_argument("--train-images", type=Path, required=True)
    parser.add_argument("--calibrate", type=int, default=32, help="number of these")
    parser.add_argument("--images", type=int, default=100, help="how many to evaluate on")
    parser.add_argument("--size", nargs=2, type=int, required=True, help="height and width that images are fitted into")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    detector, fixed = detector_from_checkpoint(args.checkpoint), Fixed(1, *args.size)
    about = describe(detector.names, [0.5] * len(detector.names), detector.preprocessing, fixed)
    source = read_data(args.val_json, args.val_images, detector.names, args.images)
    training = read_data(args.train_json, args.train_images, detector.names, args.calibrate)
    calibration = [prepare(picture.pixels, about["resize"]) for picture in pictures(training)]
    files = {form: write("onnx", exportable(detector), fixed, about, sampling=form) for form in ("grid", "gather")}
    files |= quantised(files["grid"], calibration)
    runners, refused = find_runners(files, fixed, calibration[0])
    network = {"network": lambda inputs: run_network(detector, inputs)}
    found = measure(network | runners, source, about["resize"]) | refused
    for name, content in files.items():
        found[name]["megabytes"] = len(content) / 1e6
    versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    result = {"origin": origin(torch.device("cpu")), "versions": versions, "images": len(source), "results": found}
    write_whole(args.output, lambda part: part.write_text(json.dumps(result, indent=1)))
    for name, values in found.items():
        texts = (f"{key} {value if isinstance(value, str) else format(value, '.4g')}" for key, value in values.items())
        print(f"{name:>14} " + "  ".join(texts))


if __name__ == "__main__":
    main()
