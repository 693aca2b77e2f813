"""`dino predict`: draw a checkpoint's detections in images, folders, videos or a webcam, and write them as JSON."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino.cli import SCORE_THRESH, arguments, check_arguments, new_parser
from dino.utils.files import free_name
from dino.utils.paths import PathError, expand, hint
from dino.utils.printable import printable

_EXAMPLES = """
examples:
  dino predict dino_r50_4scale_12ep photo.jpg        (published weights, downloaded once; `dino weights` lists them)
  dino predict model_final.pth photo.jpg
  dino predict output/mine photo.jpg                 (the best checkpoint of a run)
  dino predict model_final.pth photos clip.mp4 --output drawn --score-thresh 0.5
  dino predict model_final.pth "aerial/*.tif" --tile 1024 --overlap 0.2
  dino predict model_final.pth 0                     (a webcam, until Ctrl-C)
Drawn images go to the output folder under their own names, beside predictions.json: COCO format, with a score in each
annotation. Files of equal names keep their sub-folders. A video becomes an MP4 file without sound, with a JSON file of
its own. Existing files are never replaced.
"""
_DTYPES = ("fp32", "bf16", "fp16")
_PRECISIONS = ("highest", "high", "medium")
_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}

_PATTERN = re.compile(r"[*?[]|^[A-Za-z]+:/")  # a glob, or an address, of which `pathlib` may have made one slash


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino predict", __doc__, _EXAMPLES)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="of this or another program; the folder of a run or of transformers, an address, a name of `dino weights`",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, its address, folder, glob, video, or webcam's number"
    )
    parser.add_argument("--output", type=Path, help="folder to write to (default: a new one, output/predictions)")
    parser.add_argument(
        "--score-thresh",
        type=float,
        default=SCORE_THRESH,
        help="lowest score that is drawn and written (default %(default)s)",
    )
    parser.add_argument("--max-detections", type=int, help="detections per image (default: the checkpoint's own)")
    parser.add_argument("--nms", type=float, metavar="IOU", help="suppress boxes of one class that overlap by more")
    parser.add_argument("--one-label", action="store_true", help="give no box two labels")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="also cut larger images into tiles of this size")
    parser.add_argument("--overlap", type=float, default=0.2, help="of tiles, as a fraction (default %(default)s)")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="most pixels of an image (default: Pillow's limit of 179 million)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images that run together (default %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the network (default %(default)s)")
    parser.add_argument(
        "--float32-precision",
        choices=_PRECISIONS,
        default="high",
        help="of products in fp32 on a GPU; highest: no TensorFloat-32 (default %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster")
    parser.add_argument(
        "--cuda-graphs",
        type=int,
        default=8,
        metavar="N",
        help="on a GPU, number of image sizes whose kernels are recorded; 0 for none (default %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    options = _parse(argv)
    inputs, folder = options.pop("inputs"), options.pop("output") or free_name(Path("output/predictions"))

    from dino.inference import predict_files

    jobs = predict_files.plan(inputs, folder)
    predict_files.predict(predict_files.make_predictor(**options), jobs, folder)


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The arguments, with paths checked and libraries found.

    Raises:
        UserError: the checkpoint or a library is missing.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    problems = {
        f"--score-thresh must lie between 0 and 1, not {args.score_thresh:g}": not 0 <= args.score_thresh <= 1,
        f"--overlap is a fraction below 1, not {args.overlap:g}": not 0 <= args.overlap < 1,
        "--batch-size must be positive": args.batch_size < 1,
        "--output names a folder, and this is a file": args.output and args.output.is_file(),
    }
    check_arguments(parser, problems)
    arguments.check_order(args.checkpoint, *args.inputs, before="dino predict")
    args.checkpoint = arguments.find_checkpoint(args.checkpoint)
    args.output = args.output and Path(expand(args.output))
    _find_inputs(args.inputs)
    return vars(args)


def _find_inputs(words: Sequence[str]) -> None:
    """Look for files, and for OpenCV where one is a video or a webcam.

    Raises:
        UserError: one is missing.
    """
    for word in words:
        path = Path(expand(word))
        there = os.path.exists(path)
        camera = word.isdecimal() and not there
        if not there and not camera and not _PATTERN.search(word):
            raise PathError(f"input not found: {printable(word, 300)}{hint(path, set())}")
        if camera or path.suffix.lower() in _VIDEOS:
            arguments.need(("cv2",), "video", "opencv-python-headless")
