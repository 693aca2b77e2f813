"""`dino export`: write a checkpoint as one file that runs elsewhere, and compare it with the network first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import SCORE_THRESH, arguments, check_arguments, new_parser
from dino.utils.files import UserError
from dino.utils.paths import expand, find_data, find_folder

_EXAMPLES = """
examples:
  dino export output/mine model.onnx --val val.json images                      (compares AP with the network)
  dino export model_final.pth model.onnx --size 640 640 --sampling gather       (one size; no GridSample)
  dino export model_final.pth model.ts --size 800 1333
  dino export output/mine half.onnx --dtype fp16 --val val.json images          (half the size)
  dino export output/mine int8.onnx --dtype int8 --calibrate train.json images --val val.json images
docs/export.md shows how to run the file. TensorRT and OpenVINO read the ONNX file.
"""
_SUFFIXES = {".onnx": "onnx", ".pt2": "torch-export", ".ts": "torchscript", ".torchscript": "torchscript"}
_FORMATS = ("onnx", "torch-export", "torchscript")
_SAMPLING = ("grid", "gather")
_DTYPES = {"onnx": ("float32", "fp16", "int8"), "torch-export": ("float32", "bf16"), "torchscript": ("float32", "bf16")}
_WHY = {
    ("onnx", "bf16"): "ONNX Runtime computes no bfloat16 on CPUs: use --dtype fp16, or --format torch-export. OpenVINO "
    "runs a float32 file in bfloat16 by itself, where the processor has it",
    ("torch-export", "fp16"): "float16 is slow in torch on CPUs: use --dtype bf16",
    ("torch-export", "int8"): "8 bits are for ONNX: give OUT the suffix .onnx",
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino export", __doc__, _EXAMPLES)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint, the folder of a run or of transformers, an address, or a name of `dino weights`",
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
    _add_types(parser)
    parser.add_argument(
        "--score-thresh",
        nargs="+",
        type=float,
        default=[SCORE_THRESH],
        help=f"stored in the file for programs that draw: one, or one for each class (default {SCORE_THRESH})",
    )
    parser.add_argument(
        "--copy", choices=("auto", "model", "ema"), default="auto", help="ema: the running average of the weights"
    )
    parser.add_argument(
        "--val", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="data in COCO format to compare boxes and AP on"
    )
    parser.add_argument(
        "--verify", type=Path, metavar="IMAGES", help="folder of images to compare on, without annotations"
    )
    parser.add_argument("--verify-json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=50, help="number of images to compare on (default %(default)s)")
    return parser


def _add_types(parser: argparse.ArgumentParser) -> None:
    """The flags of narrower types."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "fp16", "bf16", "int8"),
        default="float32",
        help="type of convolutions and matrix products: fp16 and int8 for ONNX, bf16 for the others (default float32)",
    )
    parser.add_argument(
        "--calibrate",
        nargs=2,
        metavar=("ANNOTATIONS", "IMAGES"),
        help="for int8: training data in COCO format, to measure ranges of values on",
    )
    parser.add_argument(
        "--max-ap-loss",
        type=float,
        metavar="POINTS",
        help="refuse a file that loses more AP on --val (default: 0.1; 1 for bf16 and int8)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = _parse(argv)

    from dino.export.export_checkpoint import Narrow, export_checkpoint
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
        narrow=Narrow(args.dtype, args.calibrate, args.max_ap_loss),
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with paths checked and libraries found.

    Raises:
        UserError: the checkpoint, the data or a library is missing.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.format = args.format or _SUFFIXES.get(args.output.suffix.lower())
    arguments.check_order(args.checkpoint, str(args.output), before="dino export")
    problems = {
        f"OUT has none of the suffixes {', '.join(_SUFFIXES)}: give --format": args.format is None,
        "--size, --batch and --limit must be positive": min(*(args.size or [1]), args.batch, args.limit) < 1,
        "--size can be 10,000 at most": max(args.size or [1]) > 10_000,
        "--batch needs --size; without --size, the file takes any batch": args.batch > 1 and not args.size,
        "--verify-json needs --verify: the folder of the images": args.verify_json and not args.verify,
        "--val and --verify exclude each other": args.val and args.verify,
        "--score-thresh must lie between 0 and 1": not all(0 <= score <= 1 for score in args.score_thresh),
    }
    problems |= _problems_of_type(args)
    check_arguments(parser, problems)
    _find_files(args)
    return args


def _problems_of_type(args: argparse.Namespace) -> dict[str, bool]:
    """What is wrong with --dtype and the flags that belong to it."""
    known = args.format and args.dtype not in _DTYPES[args.format]
    why = _WHY.get((args.format.replace("torchscript", "torch-export"), args.dtype)) if known else None
    with_ap = args.val or args.verify_json
    int8 = args.dtype == "int8"
    return {
        f"--dtype {args.dtype} with --format {args.format}: {why}": bool(known),
        "--dtype int8 needs training images to measure ranges on: --calibrate ANNOTATIONS IMAGES": int8
        and not args.calibrate,
        "--dtype int8 needs validation data to measure its loss of AP on: --val ANNOTATIONS IMAGES": int8
        and not with_ap,
        "--calibrate is for --dtype int8": bool(args.calibrate) and not int8,
        "--max-ap-loss needs --val: the AP is measured there": args.max_ap_loss is not None and not with_ap,
        "--max-ap-loss must be at least 0 points": args.max_ap_loss is not None and not args.max_ap_loss >= 0,
    }


def _find_files(args: argparse.Namespace) -> None:
    """Look for checkpoint, data and libraries.

    Raises:
        UserError: one is missing, or another thing; or the output exists.
    """
    args.output = Path(expand(args.output))
    if args.output.exists():
        raise UserError(f"{args.output} exists: choose another name, or move it away")
    if args.format == "torchscript" and not args.size:
        raise UserError("TorchScript is for one size: give --size HEIGHT WIDTH")
    args.checkpoint = arguments.find_checkpoint(args.checkpoint)
    if args.val or args.verify_json:
        args.verify_json, args.verify = map(
            Path, find_data(*(args.val or (args.verify_json, args.verify)), before="--val")
        )
    elif args.verify:
        args.verify = find_folder(args.verify, "image folder")
    if args.calibrate:
        args.calibrate = tuple(map(Path, find_data(*args.calibrate, before="--calibrate")))
    if args.format == "onnx":
        arguments.need(("onnx", "onnxruntime", "onnxscript"), "ONNX", "'dino-detectron2[onnx]'")
