"""`dino predict`: draw a checkpoint's detections in images, folders, videos or a webcam, and write them as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import new_parser
from dino.utils.files import free_name

_EXAMPLES = """
examples:
  dino predict dino_r50_4scale_12ep photo.jpg        (published weights, downloaded once; `dino weights` lists them)
  dino predict model_final.pth photo.jpg
  dino predict model_final.pth photos clip.mp4 --output drawn --score-thresh 0.5
  dino predict model_final.pth "aerial/*.tif" --tile 1024 --overlap 0.2
  dino predict model_final.pth 0                     (a webcam, until Ctrl-C)
Drawn images go to the output folder under their own names, beside predictions.json: COCO format, with a score in each
annotation. Files of equal names keep their sub-folders. A video becomes an MP4 file without sound, with a JSON file of
its own. Existing files are never replaced.
"""
_DTYPES = ("fp32", "bf16", "fp16")
_PRECISIONS = ("highest", "high", "medium")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino predict", __doc__, _EXAMPLES)
    parser.add_argument(
        "checkpoint", help="a checkpoint of this or another DINO program, an address, or a name of `dino weights`"
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, its address, folder, glob, video, or webcam's number"
    )
    parser.add_argument("--output", type=Path, help="folder to write to (default: a new one, output/predictions)")
    parser.add_argument(
        "--score-thresh", type=float, default=0.4, help="lowest score that is drawn and written (default %(default)s)"
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
    options = vars(build_parser().parse_args(argv))

    from dino.inference import predict_files

    inputs, folder = options.pop("inputs"), options.pop("output") or free_name(Path("output/predictions"))
    jobs = predict_files.plan(inputs, folder)
    predict_files.predict(predict_files.make_predictor(**options), jobs, folder)
