"""`dino explain`: draw what a checkpoint computes for one training batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import arguments, new_parser
from dino.utils.files import UsageError, free_name
from dino.utils.paths import expand, find_data

_EXAMPLES = """
example:
  dino explain output/mine/model_final.pth train.json images --image 0001.jpg --image 0002.jpg
Draws the selected anchors, denoising queries, the attention mask, the boxes of each decoder layer, sampling points of
the deformable attention, gradients and losses. docs/how_it_works.md and docs/method.md say how to read them.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    usage = "CHECKPOINT ANNOTATIONS IMAGES [--image NAME] [--seed SEED] [--output FOLDER]"
    parser = new_parser("dino explain", __doc__, _EXAMPLES, usage=usage)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CHECKPOINT ANNOTATIONS IMAGES",
        help="a checkpoint, the folder of a run or of transformers, an address, or a name of `dino weights`; "
        "JSON file in COCO format; "
        "folder of its images",
    )
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    parser.add_argument(
        "--image", action="append", default=[], help="file name of an image of the batch, as in the annotations; the "
        "first one is drawn (default: the first two that have objects)"
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: a new one, output/explained)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = _parse(argv)

    from dino.explain.explain_batch import explain_batch

    folder = Path(expand(args.output)) if args.output else free_name(Path("output/explained"))
    explain_batch(Path(args.annotations), Path(args.images), args.weights, folder, wanted=args.image, seed=args.seed)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with `weights`, `annotations` and `images`.

    Raises:
        UsageError: one of these is missing, or another thing.
    """
    args = build_parser().parse_args(argv)
    words = [*([args.weights] if args.weights else []), *args.words]
    if len(words) != 3:
        raise UsageError(f"write dino explain CHECKPOINT ANNOTATIONS IMAGES: three arguments, not {len(words)}")
    arguments.check_order(*words, before="dino explain")
    args.weights = arguments.find_checkpoint(words[0])
    args.annotations, args.images = find_data(*words[1:], before=f"dino explain {words[0]}")
    return args
