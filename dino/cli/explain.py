"""`dino explain`: draw what a checkpoint computes for one training batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import new_parser
from dino.utils.files import free_name

_EXAMPLES = """
example:
  dino explain train.json images --weights output/mine/model_final.pth --image 0001.jpg --image 0002.jpg
Draws the selected anchors, denoising queries, the attention mask, the boxes of each decoder layer, sampling points of
the deformable attention, gradients and losses. docs/how_it_works.md and docs/method.md say how to read them.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino explain", __doc__, _EXAMPLES)
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS.json", help="in COCO format")
    parser.add_argument("images", type=Path, metavar="IMAGES_FOLDER", help="folder of the images")
    parser.add_argument("--weights", required=True, help="a checkpoint, an address, or a name of `dino weights`")
    parser.add_argument(
        "--image", action="append", default=[], help="file name of an image of the batch, as in the annotations; the "
        "first one is drawn (default: the first two that have objects)"
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: a new one, output/explained)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = build_parser().parse_args(argv)

    from dino.explain.explain_batch import explain_batch

    folder = args.output or free_name(Path("output/explained"))
    explain_batch(args.annotations, args.images, args.weights, folder, wanted=args.image, seed=args.seed)
