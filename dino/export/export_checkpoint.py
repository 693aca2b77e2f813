"""`dino export`: a checkpoint as one file that runs elsewhere, compared with the network before it is kept."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from dino.modeling import fold_norms
from dino.utils.files import DataError, make_folder, write_whole
from dino.weights.description import Rebuilt, model_from_checkpoint

from .export_formats import FORMATS, SAMPLING, write
from .export_wrapper import Detector, Fixed, describe
from .verify import Limits, compare, read_data, read_folder

EXAMPLE = """
examples:
  dino export model_final.pth model.onnx --verify images --verify-json val.json
  dino export model_final.pth model.onnx --size 640 640 --sampling gather       (one size; no GridSample)
  dino export model_final.pth model.ts --size 800 1333
docs/export.md shows how to run the file. TensorRT and OpenVINO read the ONNX file.
"""
SUFFIXES = {".onnx": "onnx", ".pt2": "torch-export", ".ts": "torchscript", ".torchscript": "torchscript"}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dino export", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a file of this project's training")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write; it must not exist")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of OUT (.onnx, .pt2, .ts)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="the only size to take, in pixels (default: any)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images at once, with --size (default %(default)s)")
    parser.add_argument(
        "--sampling", choices=SAMPLING, default="grid", help="gather: for engines that get GridSample wrong"
    )
    parser.add_argument(
        "--score-thresh",
        nargs="+",
        type=float,
        default=[0.5],
        help="noted in the file for those who draw: one for all classes, or one for each (default 0.5)",
    )
    parser.add_argument(
        "--copy", choices=["auto", "model", "ema"], default="auto", help="ema: the running average of the weights"
    )
    parser.add_argument("--verify", type=Path, metavar="IMAGES", help="folder of images to compare on")
    parser.add_argument(
        "--verify-json", type=Path, metavar="JSON", help="their annotations in COCO format, to compare AP"
    )
    parser.add_argument("--limit", type=int, default=50, help="of the images to compare on (default %(default)s)")
    args = parser.parse_args(argv)
    args.format = args.format or SUFFIXES.get(args.output.suffix)
    if args.format is None:
        parser.error(f"OUT has none of the suffixes {', '.join(SUFFIXES)}: give --format")
    if min(args.size or [1]) < 1 or args.batch < 1 or args.limit < 1:
        parser.error("--size, --batch and --limit must be positive")
    if args.batch > 1 and not args.size:
        parser.error("--batch goes with --size; without it, any batch is taken")
    if args.verify_json and not args.verify:
        parser.error("--verify-json needs --verify: the folder of the images")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export one file. What differs too much from the network is not kept.

    Raises:
        DataError: the checkpoint can't be used or exported, OUT exists or can't be written, or the comparison fails.
        ImportError: a library of the format is not installed.
    """
    args = parse_arguments(argv)
    if args.output.exists():
        raise DataError(f"{args.output} exists: choose another name, or move it away")
    rebuilt = model_from_checkpoint(args.checkpoint, copy=args.copy)
    fixed = Fixed(args.batch, *args.size) if args.size else None
    thresholds = spread(args.score_thresh, rebuilt.names)
    about = describe(rebuilt.names, thresholds, rebuilt.preprocessing, fixed)
    source = None
    if args.verify_json:
        source = read_data(args.verify_json, args.verify, rebuilt.names, args.limit)
    elif args.verify:
        source = read_folder(args.verify, args.limit)
    print(f"exporting {args.checkpoint} as {args.format}; this takes a minute or two", flush=True)
    content = write(args.format, exportable(rebuilt), fixed, about, sampling=args.sampling)
    run = FORMATS[args.format].run(content)
    if source is not None:
        comparison = compare(Detector(*rebuilt[::2]), run, source, resize=about["resize"], fixed=fixed)
        print(comparison)
        faults = comparison.faults(Limits())
        if faults:
            raise DataError(f"{args.output} is not written, for it differs from the network: {'; '.join(faults)}")
    make_folder(args.output.parent)
    write_whole(args.output, lambda part: part.write_bytes(content))
    size = f"batch {fixed.batch}, {fixed.height} x {fixed.width}" if fixed else "any batch and size"
    checked = "" if args.verify else "; not compared with the network: --verify IMAGES does that"
    print(f"{args.output}: {args.format}, {size}, {len(rebuilt.names)} classes, {len(content) / 1e6:.1f} MB{checked}")


def spread(thresholds: Sequence[float], names: Sequence[str]) -> list[float]:
    """One threshold for each class.

    Raises:
        DataError: their number does not fit, or one is no score.
    """
    if len(thresholds) not in (1, len(names)):
        raise DataError(f"--score-thresh has {len(thresholds)} values for {len(names)} classes: {', '.join(names)}")
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise DataError("--score-thresh must lie between 0 and 1")
    return [*thresholds] if len(thresholds) == len(names) else [*thresholds] * len(names)


def exportable(rebuilt: Rebuilt) -> Detector:
    """A copy whose fixed norms are merged into its convolutions: fewer operators, and faster in every program."""
    network = copy.deepcopy(rebuilt.network)
    fold_norms(network)
    return Detector(network, rebuilt.preprocessing).eval()
