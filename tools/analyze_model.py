"""Count parameters, multiply-adds and activations of a recipe's model; on request, measure time and memory."""

import argparse
import platform
import statistics
import sys
import warnings

from dino.cli import report_errors  # silences warnings of Detectron2; must come before its import

for message in (".*timm.models.layers.*", "torch.meshgrid"):
    warnings.filterwarnings("ignore", message=message)

import torch  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402

from dino.d2.recipe import check_recipe  # noqa: E402
from dino.layers.ops.operator import use_compiled  # noqa: E402
from dino.modeling import network_cost  # noqa: E402
from dino.utils.files import UserError  # noqa: E402
from dino.utils.overrides import apply  # noqa: E402
from dino.utils.recipes import find_recipe  # noqa: E402

EXAMPLES = """
examples:
  parameters, multiply-adds and activations, without data or weights, in seconds:
    python tools/analyze_model.py --config-file configs/dino_r50_4scale_12ep.py
  other sizes, other settings:
    python tools/analyze_model.py --config-file configs/dino_swin_l_384_5scale_12ep.py --size 1200 2000 \\
        model.network.query_selection.num_queries=300
  time and memory on this machine's GPU, two images at a time:
    python tools/analyze_model.py --config-file configs/dino_r50_4scale_12ep.py --batch 2 --measure inference training
One multiply-add counts as one, as in the tables of papers. A recipe is a Python program: run only those you trust.
"""


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="recipe, by name or file")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), metavar=("HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--measure", nargs="*", choices=("inference", "training"), default=(), help="also run it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the recipe")
    return parser


def parse(argv):
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if min(*args.size, args.batch) < 1:
        parser.error("--size and --batch must be positive")
    return args


def load_model(path, overrides):
    """The DINODetector of a recipe, with random weights."""
    path = str(find_recipe(path))
    cfg = LazyConfig.load(path)
    check_recipe(cfg, path)
    cfg = apply(cfg, overrides)
    try:
        return instantiate(cfg.model)
    except (ValueError, ImportError) as error:
        raise UserError(f"the recipe's model can't be built: {error}") from error


def print_costs(network, batch, size):
    parameters = network_cost.count_parameters(network)
    work = network_cost.count_multiply_adds(network, batch, *size)
    print(f"{'':<16} {'parameters':>12} {'trainable':>12} {'G multiply-adds':>16}")
    if not len(network.branches):
        del parameters["branches"]
    for name, (total, trainable) in parameters.items():
        print(f"{name:<16} {total:>12,} {trainable:>12,} {work[name] / 1e9:>16.2f}")
    if len(network.branches):
        print(f"inference runs no branches: {', '.join(network.branches)} are for training only")
    kept = network_cost.count_activations(network, batch, *size) / 2**20
    operator = "compiled operator" if use_compiled(torch.device("cpu")) else "operator in plain PyTorch"
    print(f"activations of the backward pass: {kept:,.0f} MiB (float32, no denoising, {operator})")


def print_measured(phase, run, device, batch):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = network_cost.measure_seconds(run, device)
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    line = f"{phase}: {median * 1e3:.0f} ms ({least * 1e3:.0f} to {most * 1e3:.0f}), {batch / median:.2f} images/s"
    if device.type == "cuda":
        line += (
            f", peak {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB on {torch.cuda.get_device_name(device)}"
        )
    else:
        line += f", threads of {platform.machine()}: {torch.get_num_threads()}"
    print(f"{line} (float32, median of {len(seconds)} runs after 2 warm-up runs)", flush=True)


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
    sys.exit(report_errors(main))
