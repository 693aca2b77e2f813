"""`dino convert`: convert checkpoints between this project, the official program, detrex and Hugging Face."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import new_parser

_EXAMPLES = """
examples:
  the official 12-epoch checkpoint as one of this project, with COCO's 80 classes and their names inside:
    %(prog)s checkpoint0011_4scale.pth dino_r50_4scale.pth --to own --coco80
  detrex' 12-epoch checkpoint, whose position encoding has other constants:
    %(prog)s dino_r50_4scale_12ep_49_2AP.pth own.pth --to own --temperature 10000 --offset -0.5
  back to the official program: %(prog)s own.pth official.pth --to official
Training and evaluation read all of these formats directly: train.init_checkpoint=checkpoint0011_4scale.pth
"""
_FORMATS = ("own", "official", "detrex", "huggingface", "mmdetection", "safetensors")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino convert", __doc__, _EXAMPLES)
    parser.add_argument(
        "input", metavar="IN", help="a checkpoint in any known format, an address, or a name of `dino weights`"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write; it must not exist")
    parser.add_argument(
        "--to",
        required=True,
        choices=_FORMATS,
        help="the format to write; safetensors: own format in such a file. official and huggingface need a model "
        "whose decoder layers share one pair of heads",
    )
    parser.add_argument(
        "--coco80", action="store_true", help="of 91 classes (raw ids), keep the 80 that COCO has; drops the other rows"
    )
    parser.add_argument(
        "--copy",
        choices=("auto", "model", "ema"),
        default="auto",
        help="ema: the running average; auto: the running average if the file has one",
    )
    parser.add_argument("--temperature", type=float, help="of the position encoding that IN was trained with (20)")
    parser.add_argument("--offset", type=float, help="of the same position encoding (0)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    options = vars(build_parser().parse_args(argv))

    from dino.weights.conversion import convert_file

    convert_file(options.pop("input"), options.pop("output"), **options)
