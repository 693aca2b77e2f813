"""What a recipe's model costs: parameters, multiply-adds and activations; on request, measured times and memory."""

import argparse
import os
import platform
import statistics
import sys
import warnings

from dino.modeling import network_cost

for message in (".*torch.jit.*is deprecated.*", ".*pkg_resources is deprecated.*", ".*timm.models.layers.*"):
    warnings.filterwarnings("ignore", message=message)  # of Detectron2 itself; must come before its import
warnings.filterwarnings("ignore", message="torch.meshgrid")

import torch  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402

from dino.d2.recipe import check_overrides, check_recipe  # noqa: E402
from dino.layers.ops.operator import use_compiled  # noqa: E402
from dino.utils.files import DataError, UserError, message_of  # noqa: E402

EXAMPLES = """
examples:
  parameters, multiply-adds and activations, without data or weights, in seconds:
    python tools/analyze_model.py --config-file configs/dino_r50_4scale_12ep.py
  other sizes, other settings:
    python tools/analyze_model.py --config-file configs/dino_swin_l_384_5scale_12ep.py --size 1200 2000 \\
        model.network.query_selection.num_queries=300
  time and memory on this machine's GPU, two images at a time:
    python tools/analyze_model.py --config-file configs/dino_r50_4scale_12ep.py --batch 2 --measure inference training
One multiply-add is counted as one, as in the tables of papers. A recipe is a Python program: run only those you trust.
"""


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a recipe")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), metavar=("HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--measure", nargs="*", choices=("inference", "training"), default=(), help="run it, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="changes of the recipe")
    args = parser.parse_intermixed_args(argv)
    if min(*args.size, args.batch) < 1:
        parser.error("--size and --batch must be positive")
    return args


def load_model(path, overrides):
    """The DINODetector of a recipe, with random weights."""
    if not os.path.isfile(path):
        raise DataError(f"recipe not found: {path}")
    cfg = LazyConfig.load(path)
    check_recipe(cfg, path)
    check_overrides(cfg, overrides)
    return instantiate(LazyConfig.apply_overrides(cfg, overrides).model)


def print_costs(network, batch, size):
    parameters = network_cost.count_parameters(network)
    work = network_cost.count_multiply_adds(network, batch, *size)
    print(f"{'':<16} {'parameters':>12} {'trainable':>12} {'G multiply-adds':>16}")
    for name, (total, trainable) in parameters.items():
        print(f"{name:<16} {total:>12,} {trainable:>12,} {work[name] / 1e9:>16.2f}")
    kept = network_cost.count_activations(network, batch, *size) / 2**20
    operator = "compiled operator" if use_compiled(torch.device("cpu")) else "operator in plain PyTorch"
    print(f"kept for the backward pass: {kept:,.0f} MiB (float32, no denoising, {operator})")


def print_measured(what, run, device, batch):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = network_cost.measure_seconds(run, device)
    middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
    line = f"{what}: {middle * 1e3:.0f} ms ({least * 1e3:.0f} to {most * 1e3:.0f}), {batch / middle:.2f} images/s"
    if device.type == "cuda":
        line += (
            f", peak {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB on {torch.cuda.get_device_name(device)}"
        )
    else:
        line += f", threads of {platform.machine()}: {torch.get_num_threads()}"
    print(f"{line} (float32, median of {len(seconds)} after 2 to warm up)", flush=True)


def main(argv=None):
    args = parse(argv)
    model = load_model(args.config_file, args.opts)
    height, width = args.size
    print(f"{args.config_file}: {args.batch} image{'s' * (args.batch > 1)} of {height}x{width}")
    print_costs(model.network, args.batch, args.size)
    device = torch.device(args.device)
    model.to(device)
    if "inference" in args.measure:
        print_measured("inference", network_cost.inference(model.network, args.batch, *args.size), device, args.batch)
    if "training" in args.measure:
        step = network_cost.training_step(model.network, model.criterion, args.batch, *args.size)
        print_measured("forward and backward", step, device, args.batch)


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.exit(f"error: {message_of(error)}")
