"""`dino convert`: convert checkpoints from and to the formats of other DINO programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import arguments, new_parser
from dino.utils.paths import expand

_EXAMPLES = """
examples:
  the official 12-epoch checkpoint as one of this project, with COCO's 80 classes and their names inside:
    %(prog)s checkpoint0011_4scale.pth dino_r50_4scale.pth --to own --coco80
  published weights by name: %(prog)s dino_r50_4scale_12ep own.pth --to own
  a checkpoint of your training with detrex, which does not store its position encoding:
    %(prog)s model_final.pth own.pth --to own --temperature 10000 --offset -0.5
  back to the official program: %(prog)s own.pth official.pth --to official
  a folder for transformers (config.json, model.safetensors, preprocessor_config.json):
    %(prog)s own.pth mine --to huggingface
  and back: %(prog)s mine own.pth --to own
Training and evaluation read all of these formats directly: --weights checkpoint0011_4scale.pth
"""
_FORMATS = ("own", "official", "detrex", "huggingface", "mmdetection", "safetensors")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino convert", __doc__, _EXAMPLES)
    parser.add_argument(
        "input",
        metavar="CHECKPOINT",
        help="in any known format; or the folder of a run or of transformers, an address, a name of `dino weights`",
    )
    parser.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        help="the file to write; with --to huggingface a folder, unless it ends in .pth or .safetensors: then a file "
        "under the names of transformers' own proposal. It must not exist",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=_FORMATS,
        help="the format to write; safetensors: own format in such a file. official, and huggingface in a file, need a "
        "model whose decoder layers share one pair of heads",
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
    parser.add_argument(
        "--temperature",
        type=float,
        help="of the position encoding that IN was trained with, where the file does not say it",
    )
    parser.add_argument("--offset", type=float, help="of the same position encoding")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    options = vars(build_parser().parse_args(argv))
    source = arguments.find_checkpoint(options.pop("input"))

    from dino.weights.conversion import convert_file

    convert_file(source, Path(expand(options.pop("output"))), **options)
