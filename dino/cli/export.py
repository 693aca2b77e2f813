"""`dino export`: write a checkpoint as one file that runs elsewhere, and compare it with the network first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import check_arguments, new_parser

_EXAMPLES = """
examples:
  dino export model_final.pth model.onnx --verify images --verify-json val.json
  dino export model_final.pth model.onnx --size 640 640 --sampling gather       (one size; no GridSample)
  dino export model_final.pth model.ts --size 800 1333
docs/export.md shows how to run the file. TensorRT and OpenVINO read the ONNX file.
"""
_SUFFIXES = {".onnx": "onnx", ".pt2": "torch-export", ".ts": "torchscript", ".torchscript": "torchscript"}
_FORMATS = ("onnx", "torch-export", "torchscript")
_SAMPLING = ("grid", "gather")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino export", __doc__, _EXAMPLES)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, an address, or a name of `dino weights`"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write; it must not exist")
    parser.add_argument("--format", choices=_FORMATS, help="default: by the suffix of OUT (.onnx, .pt2, .ts)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="the only size to take, in pixels (default: any)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images at once, with --size (default %(default)s)")
    parser.add_argument(
        "--sampling", choices=_SAMPLING, default="grid", help="gather: for engines whose GridSample is wrong"
    )
    parser.add_argument(
        "--score-thresh",
        nargs="+",
        type=float,
        default=[0.5],
        help="stored in the file for programs that draw: one for all classes, or one for each (default 0.5)",
    )
    parser.add_argument(
        "--copy", choices=("auto", "model", "ema"), default="auto", help="ema: the running average of the weights"
    )
    parser.add_argument("--verify", type=Path, metavar="IMAGES", help="folder of images to compare on")
    parser.add_argument(
        "--verify-json", type=Path, metavar="JSON", help="their annotations in COCO format, to compare AP"
    )
    parser.add_argument("--limit", type=int, default=50, help="number of images to compare on (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = _parse(argv)

    from dino.export.export_checkpoint import export_checkpoint
    from dino.export.export_wrapper import Fixed

    export_checkpoint(
        args.checkpoint,
        args.output,
        form=args.format,
        fixed=Fixed(args.batch, *args.size) if args.size else None,
        sampling=args.sampling,
        thresholds=args.score_thresh,
        copy=args.copy,
        verify=args.verify,
        verify_json=args.verify_json,
        limit=args.limit,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.format = args.format or _SUFFIXES.get(args.output.suffix)
    problems = {
        f"OUT has none of the suffixes {', '.join(_SUFFIXES)}: give --format": args.format is None,
        "--size, --batch and --limit must be positive": min(*(args.size or [1]), args.batch, args.limit) < 1,
        "--batch needs --size; without --size, the file takes any batch": args.batch > 1 and not args.size,
        "--verify-json needs --verify: the folder of the images": args.verify_json and not args.verify,
    }
    check_arguments(parser, problems)
    return args
