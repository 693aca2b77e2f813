"""Size, time and AP of exported models on a CPU, by engine and type of arithmetic.

    python benchmarks/export_cpu.py model.pth --val val.json images --train train.json images --output results.json
    python benchmarks/export_cpu.py --table results.json      (into docs/export.md)

AP and one time come from `model.pth`, on each validation image. The other times come from the published network
(ResNet-50, 4 scales, 80 classes) with random weights, of which time does not depend, on images of noise. Contenders
take turns: every round runs each of them once; times are medians over rounds, after one that does not count. `torch`
is the network as `dino predict` runs it. OpenVINO reads the ONNX files; its `bf16` is its default on processors that
have it, and its `int8` computes the rest in bfloat16 there. Beside wall time, results hold processor time.
"""

import argparse
import collections
import functools
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import ROOT, origin

from dino.evaluation.average_precision import evaluate, to_results
from dino.export.export_checkpoint import Narrow, export_checkpoint, exportable
from dino.export.export_formats import write
from dino.export.export_wrapper import Prepared, describe, prepare
from dino.export.onnx_int8 import quantised
from dino.export.onnx_types import to_float16
from dino.export.verify import pictures, read_data, run_exported
from dino.inference.cpu import prepare_for_cpu
from dino.inference.tiling import scale
from dino.modeling import TorchvisionBackbone, build_dino, compile_network
from dino.modeling.detector import Detector
from dino.utils.files import write_whole
from dino.weights.description import detector_from_checkpoint

PAGE = ROOT / "docs/export.md"
BEGIN, END = "<!-- begin: made by benchmarks/export_cpu.py -->", "<!-- end -->"
SIZES = ((480, 640), (800, 1066))
TYPES = ("float32", "fp16", "int8")
ROWS = {
    "torch float32": "PyTorch, float32",
    "torch bf16": "PyTorch, bfloat16",
    "torch compiled": "PyTorch, compiled",
    **{f"onnxruntime {kind}": f"ONNX Runtime, {kind}" for kind in TYPES},
    **{f"openvino {kind}": f"OpenVINO, {kind}" for kind in ("float32", "bf16", "int8")},
}
NUM_CLASSES = 80


def network_runner(detector, dtype=torch.float32, compiled=False):
    """Detect by PyTorch, as `dino predict` does."""
    detector.network.to(dtype)
    prepare_for_cpu(detector.network)
    if compiled:
        compile_network(detector.network)

    def run(inputs):
        height, width = inputs.sizes[0]
        return detector.detect([torch.from_numpy(inputs.images[0, :, :height, :width])])[0]

    return run


def onnxruntime_session(path, threads, **options):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def onnxruntime_runner(path, threads):
    session = onnxruntime_session(path, threads)
    outputs = ["boxes", "scores", "labels"]
    return functools.partial(run_exported, lambda images, sizes: session.run(outputs, feed(images, sizes)), fixed=None)


def openvino_runner(path, threads, hint):
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, **({"INFERENCE_PRECISION_HINT": hint} if hint else {})}
    compiled = openvino.compile_model(openvino.Core().read_model(path), "CPU", settings)

    def run(images, sizes):
        found = compiled(feed(images, sizes))
        return [found[name] for name in ("boxes", "scores", "labels")]

    return functools.partial(run_exported, run, fixed=None)


def feed(images, sizes):
    return {"images": images, "sizes": sizes}


def runners(make_detector, files, threads, chosen):
    """Name -> function from `Prepared` to detections."""
    makers = {
        "torch float32": lambda: network_runner(make_detector()),
        "torch bf16": lambda: network_runner(make_detector(), torch.bfloat16),
        "torch compiled": lambda: network_runner(make_detector(), compiled=True),
        **{f"onnxruntime {k}": functools.partial(onnxruntime_runner, files[k], threads) for k in TYPES},
        "openvino float32": lambda: openvino_runner(files["float32"], threads, "f32"),
        "openvino bf16": lambda: openvino_runner(files["float32"], threads, "bf16"),
        "openvino int8": lambda: openvino_runner(files["int8"], threads, None),
    }
    return {name: makers[name]() for name in ROWS if name in chosen}


def timed(run, inputs):
    """Result, and milliseconds on the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run(inputs)
    return found, (1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu))


def medians(times):
    """Of (wall, processor) pairs, but for the first."""
    wall, cpu = (statistics.median(values) for values in zip(*(times[1:] or times), strict=True))
    return {"milliseconds": wall, "processor_milliseconds": cpu}


def measure_trained(contenders, data, resize):
    """AP and times on each image."""
    times, results = collections.defaultdict(list), collections.defaultdict(list)
    for picture in pictures(data):
        inputs = prepare(picture.pixels, resize)
        for name, run in contenders.items():
            found, spent = timed(run, inputs)
            times[name].append(spent)
            scaled = scale(found, inputs.sizes[0].tolist(), picture.pixels.shape[:2])
            results[name] += to_results(scaled, picture.image_id, data.category_ids)
    return {name: {"AP": evaluate(data.data, results[name])["AP"], **medians(times[name])} for name in contenders}


def measure_times(contenders, size, rounds):
    """Times on noise of one size."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, *size), dtype=np.uint8)
    inputs = Prepared(pixels, np.array([size], np.int64))
    times = collections.defaultdict(list)
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            times[name].append(timed(run, inputs)[1])
    return {name: medians(values) for name, values in times.items()}


def profile(path, size, threads, runs=3):
    """Operator -> its share of ONNX Runtime's time, the largest first."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"enable_profiling": True, "profile_file_prefix": f"{folder}/profile"}
        session = onnxruntime_session(path, threads, **options)
        for _ in range(runs):
            session.run(None, feed(np.zeros((1, 3, *size), np.uint8), np.array([size], np.int64)))
        events = json.loads(Path(session.end_profiling()).read_text())
    spent = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: value / spent.total() for name, value in spent.most_common(12)}


def random_detector():
    torch.manual_seed(0)
    network = build_dino(backbone=TorchvisionBackbone("resnet50"), num_classes=NUM_CLASSES)
    return Detector(network, names=[f"class {i}" for i in range(NUM_CLASSES)]).eval()


def export_random(folder, train, names):
    """Type -> file of the published network, and its size in MB; ranges of 4 training images."""
    detector = random_detector()
    about = describe(detector.names, [0.5] * NUM_CLASSES, detector.preprocessing, None)
    data = read_data(*train, names, 4)
    calibration = [prepare(picture.pixels, {"short_side": SIZES[0][0], "max_size": None}) for picture in pictures(data)]
    content = write("onnx", exportable(detector), None, about)
    made = {
        "float32": content,
        "fp16": to_float16(content),
        "int8": next(quantised(content, calibration, None))[1],
    }
    return {kind: put(folder / f"random_{kind}.onnx", content) for kind, content in made.items()}


def put(path, content):
    path.write_bytes(content)
    return str(path)


def export_trained(folder, args):
    """Type -> file, as `dino export` writes it."""
    files = {kind: folder / f"trained_{kind}.onnx" for kind in TYPES}
    for kind, path in files.items():
        narrow = Narrow(kind, tuple(args.train) if kind == "int8" else None)
        data = {"verify_json": args.val[0], "verify": args.val[1], "limit": args.images}
        export_checkpoint(args.checkpoint, path, form="onnx", narrow=narrow, **(data if kind == "int8" else {}))
    return {kind: str(path) for kind, path in files.items()}


def megabytes(files):
    return {kind: os.path.getsize(path) / 1e6 for kind, path in files.items()}


def measure(args):
    """All results."""
    load, threads = os.getloadavg(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = functools.partial(detector_from_checkpoint, args.checkpoint)
        files = export_trained(folder, args)
        data = read_data(*args.val, trained().names, args.images)
        contenders = runners(trained, files, threads, args.contenders)
        resize = describe([], [], trained().preprocessing, None)["resize"]
        result = {"trained": measure_trained(contenders, data, resize)}
        result["trained_megabytes"], result["images"] = megabytes(files), len(data)
        files = export_random(folder, args.train, trained().names)
        contenders = runners(random_detector, files, threads, args.contenders)
        for size in SIZES:
            result["{}x{}".format(*size)] = measure_times(contenders, size, args.rounds)
        result["megabytes"] = megabytes(files)
        result["profile"] = {kind: profile(files[kind], SIZES[0], threads) for kind in ("float32", "int8")}
    return {"load_average": {"before": load, "after": os.getloadavg()}, "rounds": args.rounds} | result


def table(result):
    """Lines of the table in docs/export.md."""
    sizes = ["{}x{}".format(*size) for size in SIZES]
    yield f"| engine, type | MB | {sizes[0]}, ms | {sizes[1]}, ms | trained: MB | ms | AP |"
    yield "|---|---|---|---|---|---|---|"
    for name, words in ROWS.items():
        if name not in result["trained"]:
            continue
        engine, kind = name.split()
        of_file = {"bf16": "float32"}.get(kind, kind)
        cells = [*(_time(result[size], name, engine) for size in sizes), "", _time(result["trained"], name, engine)]
        if engine != "torch":
            cells[2] = f"{result['trained_megabytes'][of_file]:.1f}"
        size = "" if engine == "torch" else f"{result['megabytes'][of_file]:.0f}"
        yield f"| {words} | {size} | {' | '.join(cells)} | {100 * result['trained'][name]['AP']:.2f} |"


def _time(times, name, engine):
    """Milliseconds, and how many times as fast as float32 in the same engine."""
    base = times[f"{engine} float32"]["milliseconds"]
    return f"{times[name]['milliseconds']:.0f} ({base / times[name]['milliseconds']:.2f})"


def section(result):
    """What docs/export.md says about one file of results."""
    origin_, profiles = result["origin"], result["profile"]
    about, libraries = origin_["hardware"], ", ".join(" ".join(x) for x in result["versions"].items())
    load = result["load_average"]
    saved = sum(profiles["float32"].get(name, 0) for name in ("GridSample", "ReduceSum"))
    shares = (
        f"in {kind} {', '.join(f'{name} {100 * share:.0f} %' for name, share in list(values.items())[:8])}"
        for kind, values in profiles.items()
    )
    return "\n".join(
        [
            *table(result),
            "",
            f"{about['cpu']}, {about['threads']} of {about['cores']} cores, {origin_['date']}, torch "
            f"{origin_['versions']['torch']}, {libraries}; medians of {result['rounds']} rounds (trained: of "
            f"{result['images']} images); load of the machine {load['before'][0]:.1f} before, {load['after'][0]:.1f} "
            "after. In brackets: how many times as fast as float32 in the same engine.",
            "",
            f"ONNX Runtime's time by operator at {SIZES[0][0]}x{SIZES[0][1]}: {'; '.join(shares)}. "
            f"An operator of our own could save GridSample and ReduceSum at most, for {1 / (1 - saved):.2f} times the "
            "speed: too little to build it.",
        ]
    )


def write_page(result):
    """Put the section between its marks."""
    text, marks = PAGE.read_text(), re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    made = f"{BEGIN}\n\n{section(result)}\n\n{END}"
    write_whole(PAGE, lambda part: part.write_text(marks.sub(lambda _: made, text)))


def versions():
    import onnx
    import onnxruntime
    import openvino

    return {library.__name__: library.__version__ for library in (onnx, onnxruntime, openvino)}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    for name, what in (("--val", "to measure AP on"), ("--train", "to measure ranges on")):
        parser.add_argument(name, nargs=2, type=Path, metavar=("ANNOTATIONS", "IMAGES"), help=f"COCO data {what}")
    parser.add_argument("--images", type=int, default=1000, help="most of the validation images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the times on noise (default %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="put the table of a file of results into docs/export.md instead")
    return parser


@torch.no_grad()
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.table:
        write_page(json.loads(args.table.read_text()))
        return
    if not (args.checkpoint and args.val and args.train and args.output):
        parser.error("give CHECKPOINT, --val, --train and --output, or --table")
    result = {"origin": origin(torch.device("cpu")), "versions": versions(), **measure(args)}
    write_whole(args.output, lambda part: part.write_text(json.dumps(result, indent=1)))
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
