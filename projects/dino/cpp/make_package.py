"""Compile a program of `dino export` to machine code that C++ runs without Python: AOTInductor, for this CPU.

    dino export output/mine mine.pt2 --size 480 640
    python projects/dino/cpp/make_package.py mine.pt2 mine_package.pt2

docs/serving.md explains. The compiler is that of torch.compile (g++), and it takes minutes.
"""

import json
import sys

import torch

from dino.cli import new_parser, report_errors
from dino.utils.files import UserError


def to_metadata(about):
    """The description of an exported program as texts: lines of names and thresholds, numbers of the resizing rule."""
    texts = {key: "\n".join(map(str, about[key])) for key in ("names", "thresholds")}
    rule = about["resize"]
    if "fit" in rule:
        return texts | dict(zip(("fit_height", "fit_width"), map(str, rule["fit"]), strict=True))
    return texts | {key: str(rule[key] or 0) for key in ("short_side", "max_size")}


def build_parser():
    parser = new_parser("make_package.py", __doc__, "")
    parser.add_argument("program", metavar="PROGRAM.pt2", help="written by `dino export`")
    parser.add_argument("package", metavar="PACKAGE.pt2", help="the file to write")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if not args.package.endswith(".pt2"):
        raise UserError(f"{args.package}: torch wants a name that ends in .pt2")
    files = {"dino.json": ""}
    program = torch.export.load(args.program, extra_files=files)
    if not files["dino.json"]:
        raise UserError(f"{args.program} has no description: it was not written by `dino export`")
    options = {"aot_inductor.metadata": to_metadata(json.loads(files["dino.json"]))}
    torch._inductor.aoti_compile_and_package(program, package_path=args.package, inductor_configs=options)
    print(f"{args.package}: for CPUs like this one")


if __name__ == "__main__":
    sys.exit(report_errors(main))
