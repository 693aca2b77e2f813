"""Compile a checkpoint to machine code that C++ runs without Python: AOTInductor, for CPUs like this one.

    python projects/dino/cpp/make_package.py output/mine package --size 480 640

writes a folder with the compiled network, which holds its weights, and the attention operator; main.cpp runs it.
docs/serving.md explains. The compiler is that of torch.compile (g++), and it takes minutes.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from dino.cli import SCORE_THRESH, arguments, check_arguments, new_parser, report_errors
from dino.export.export_checkpoint import exportable
from dino.export.export_wrapper import Fixed, describe
from dino.layers import deform_attn_implementation
from dino.layers.ops import operator
from dino.utils.files import UserError, make_folder
from dino.weights.description import detector_from_checkpoint

NETWORK = "network.pt2"
OPERATOR = ("_deform_attn_schema.so", "_deform_attn_cpu.so")  # main.cpp loads them in this order


def to_metadata(about):
    """What main.cpp must know, as texts: lines of names and thresholds, and the size that pictures are fitted into."""
    height, width = about["resize"]["fit"]
    names = [" ".join(name.split()) or f"class {label}" for label, name in enumerate(about["names"])]  # a line each
    lines = {"names": "\n".join(names), "thresholds": "\n".join(map(str, about["thresholds"]))}
    return {**lines, "height": str(height), "width": str(width)}


@torch.no_grad()
def compile_network(detector, fixed, metadata, path):
    """Write the compiled network: images (1, 3, H, W) uint8 and sizes (1, 2) int64 -> boxes, scores, labels."""
    example = torch.zeros(fixed.batch, 3, fixed.height, fixed.width, dtype=torch.uint8), torch.tensor([fixed[1:]])
    with deform_attn_implementation("compiled"):
        program = torch.export.export(exportable(detector), example, strict=False)
    options = {"aot_inductor.metadata": metadata}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def build_parser():
    parser = new_parser("make_package.py", __doc__, "")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, the folder of a run, an address or name"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), required=True, help="in pixels")
    parser.add_argument("--score-thresh", type=float, default=SCORE_THRESH, help="default %(default)s")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    wrong = {"--size must be positive": min(args.size) < 1}
    wrong["--score-thresh must lie between 0 and 1"] = not 0 <= args.score_thresh <= 1
    check_arguments(parser, wrong)
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: choose another name, or move it away")
    found = operator.verdict(torch.device("cpu"))
    if not found.usable:
        raise UserError(f"the compiled attention operator is needed, but {found.reason}")
    detector = detector_from_checkpoint(arguments.find_checkpoint(args.checkpoint))
    fixed = Fixed(1, *args.size)
    about = describe(detector.names, [args.score_thresh] * len(detector.names), detector.preprocessing, fixed)
    print("compiling; this takes minutes", flush=True)
    make_folder(args.folder.parent)
    with tempfile.TemporaryDirectory(dir=args.folder.parent, prefix=".") as outer:
        part = Path(outer, "package")
        part.mkdir()
        compile_network(detector, fixed, to_metadata(about), part / NETWORK)
        for name in OPERATOR:
            shutil.copy(operator.FOLDER / name, part)
        part.rename(args.folder)
    print(f"{args.folder}: {args.size[0]} x {args.size[1]}, {len(detector.names)} classes, for CPUs like this one")


if __name__ == "__main__":
    sys.exit(report_errors(main))
