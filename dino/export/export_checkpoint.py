"""`dino export`: a checkpoint as one file that runs elsewhere, compared with the network before it is kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from dino.modeling import fold_norms
from dino.modeling.detector import Detector
from dino.utils.files import DataError, make_folder, write_whole
from dino.weights.description import detector_from_checkpoint

from .export_formats import FORMATS, SAMPLING, write
from .export_wrapper import ExportWrapper, Fixed, describe
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
    """Run the verb."""
    options = vars(parse_arguments(argv))
    export_checkpoint(options.pop("checkpoint"), options.pop("output"), options.pop("format"), **options)


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    format: str,
    *,
    size: Sequence[int] | None = None,
    batch: int = 1,
    sampling: str = "grid",
    score_thresh: Sequence[float] = (0.5,),
    copy: str = "auto",
    verify: Path | None = None,
    verify_json: Path | None = None,
    limit: int = 50,
) -> None:
    """Export one file. A file that differs too much from the network is not kept.

    Args:
        format: a key of FORMATS.
        size: height and width in pixels, the only size to take; None for any.
        batch: images at once, with `size`.
        sampling: "grid", or "gather" for engines whose GridSample is wrong.
        score_thresh: stored in the file: one for all classes, or one for each.
        copy: "model", "ema", or "auto" for the running average if the checkpoint has one.
        verify: folder of images to compare on. verify_json: their annotations, to compare AP.
        limit: number of these images.

    Raises:
        DataError: the checkpoint or an option can't be used, the comparison fails, or the output can't be written.
        ImportError: a library of the format is not installed.
    """
    if output.exists():
        raise DataError(f"{output} exists: choose another name, or move it away")
    detector = detector_from_checkpoint(checkpoint, copy)
    fixed = Fixed(batch, *size) if size else None
    about = describe(detector.names, _spread(score_thresh, detector.names), detector.preprocessing, fixed)
    source = _read_images(verify, verify_json, detector.names, limit)
    print(f"exporting {checkpoint} as {format}; this takes a minute or two", flush=True)
    content = write(format, exportable(detector), fixed, about, sampling=sampling)
    run = FORMATS[format].run(content)
    if source is not None:
        comparison = compare(detector, run, source, resize=about["resize"], fixed=fixed)
        print(comparison)
        if issues := comparison.issues(Limits()):
            raise DataError(f"{output} is not written, since it differs from the network: {'; '.join(issues)}")
    make_folder(output.parent)
    write_whole(output, lambda part: part.write_bytes(content))
    shape = f"batch {batch}, {size[0]} x {size[1]}" if size else "any batch and size"
    checked = "" if verify else "; not compared with the network: --verify IMAGES does that"
    print(f"{output}: {format}, {shape}, {len(detector.names)} classes, {len(content) / 1e6:.1f} MB{checked}")


def _read_images(folder: Path | None, annotations: Path | None, names: Sequence[str], limit: int) -> Any:
    """The images to compare on, with annotations if there are any; None without a folder."""
    if folder is None:
        return None
    return read_data(annotations, folder, names, limit) if annotations else read_folder(folder, limit)


def _spread(thresholds: Sequence[float], names: Sequence[str]) -> list[float]:
    """One threshold for each class.

    Raises:
        DataError: their number does not fit, or one is no score.
    """
    if len(thresholds) not in (1, len(names)):
        raise DataError(f"--score-thresh has {len(thresholds)} values for {len(names)} classes: {', '.join(names)}")
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise DataError("--score-thresh must lie between 0 and 1")
    return [*thresholds] if len(thresholds) == len(names) else [*thresholds] * len(names)


def exportable(detector: Detector) -> ExportWrapper:
    """Wrap a copy with its batch norms folded into its convolutions: fewer operators, and faster in every program."""
    detector = deepcopy(detector)
    fold_norms(detector.network)
    return ExportWrapper(detector).eval()
