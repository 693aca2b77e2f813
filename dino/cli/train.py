"""`dino train`: train or evaluate a LazyConfig recipe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dino.cli import new_parser

_EXAMPLES = """
examples:
  train on COCO (in the folder DETECTRON2_DATASETS), 8 GPUs:
    %(prog)s --config-file dino_r50_4scale_12ep --num-gpus 8
  train on your own data, no file edited:
    %(prog)s --config-file dino_r18_small_data \\
        --train-json train.json --train-images images --val-json val.json --val-images images
  evaluate (`dino eval` also writes a report):
    %(prog)s --config-file dino_r50_4scale_12ep --eval-only \\
        train.init_checkpoint=output/model_final.pth
  several machines, elastic: see docs/scaling.md
  continue: add --resume. Change anything: append key=value, for example optimizer.lr=5e-5 train.amp.enabled=True
A recipe is a name or a file. A recipe is a Python program: run only recipes that you trust.
"""


def build_parser(prog: str = "dino train") -> argparse.ArgumentParser:
    """The flags of Detectron2's programs, and four for data in COCO format."""
    parser = new_parser(prog, __doc__, _EXAMPLES)
    parser.add_argument("--config-file", default="", metavar="FILE", help="recipe, by name or file")
    parser.add_argument("--resume", action="store_true", help="continue the run in train.output_dir")
    parser.add_argument("--eval-only", action="store_true", help="evaluate train.init_checkpoint, train nothing")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine, one for each GPU")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0 on")
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}",  # as in Detectron2
        help="address of machine 0, such as tcp://HOST:29500; a single machine ignores it and takes a free port",
    )
    _add_data_arguments(parser, "train")
    _add_data_arguments(parser, "val")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the recipe, key=value")
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser, split: str) -> None:
    """The two arguments for one split of the data in COCO format."""
    group = parser.add_argument_group(f"{split} data in COCO format, instead of the recipe's")
    group.add_argument(f"--{split}-json", help="annotations")
    group.add_argument(f"--{split}-images", help="folder of their images")


def main(argv: Sequence[str] | None = None, prog: str = "dino train") -> None:
    """Run the verb."""
    args = build_parser(prog).parse_args(argv)

    from dino.d2.recipe import DataFiles
    from dino.d2.training.launch import Job, run
    from dino.d2.training.parallel import Processes

    files = DataFiles(args.train_json, args.train_images, args.val_json, args.val_images)
    job = Job(args.config_file, args.opts, files, eval_only=args.eval_only, resume=args.resume)
    run(job, Processes(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url))
