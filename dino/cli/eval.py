"""`dino eval`: AP, curves, best thresholds, confusions and the worst images of a checkpoint, in one report.html."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dino.cli import check_arguments, new_parser
from dino.utils.files import UserError

_EXAMPLES = """
examples:
  dino eval --weights output/mine/model_final.pth --val-json val.json --val-images images
  dino eval --weights model.pth --dataset coco_2017_val --num-gpus 2
  dino eval --weights dino_r50_4scale_12ep --dataset coco_2017_val     (published weights, downloaded once)
  dino eval --weights checkpoint0011_4scale.pth --dataset coco_2017_val          (a file of another program)
  dino eval --results detections.json --val-json val.json --val-images images     (of any program, no model)
  dino eval --results output/predictions/predictions.json --val-json val.json --val-images images
Data without annotations gives a page of predictions. A recipe is a program: run only recipes that you trust.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino eval", __doc__, _EXAMPLES)
    parser.add_argument(
        "--config-file", default="", help="recipe, by name or file (default: what the checkpoint shows)"
    )
    parser.add_argument("--weights", help="a checkpoint, an address, or a name of `dino weights`")
    parser.add_argument(
        "--results",
        type=Path,
        help="detections in COCO's results format, or a predictions.json, instead of recipe and weights",
    )
    parser.add_argument("--val-json", help="annotations in COCO format, instead of the recipe's data")
    parser.add_argument("--val-images", help="folder of their images")
    parser.add_argument("--dataset", help="name of a data set that Detectron2 knows, instead of the recipe's data")
    parser.add_argument("--output", type=Path, help="folder for the report (default: a new one, output/evaluation)")
    parser.add_argument("--shown", type=int, default=24, help="how many images to draw (default %(default)s)")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="processes, one per GPU or, without one, on the CPU (default %(default)s)",
    )
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, key=value")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = _parse(argv)
    if "LOCAL_RANK" in os.environ:
        raise UserError("`dino eval` starts its processes itself: write --num-gpus N instead of torchrun")

    from dino.evaluation.report import evaluate

    with evaluate.claim_report(args.output) as folder:
        if args.results:
            detected = evaluate.read_detections(args.results, args.val_json, args.val_images)
        else:
            from dino.api import detect

            detected = detect(
                folder,
                args.weights,
                config_file=args.config_file,
                overrides=args.opts,
                val_json=args.val_json,
                val_images=args.val_images,
                dataset=args.dataset,
                num_gpus=args.num_gpus,
            )
        evaluate.write_evaluation(folder, detected, args.shown)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    no_data = not (args.results or args.config_file or args.val_json or args.dataset)
    problems = {
        "--dataset and --val-json exclude each other": args.dataset and args.val_json,
        "--results needs --val-json and --val-images": args.results and not (args.val_json and args.val_images),
        "without --config-file, name the data: --val-json and --val-images, or --dataset": no_data,
        "--shown can't be negative": args.shown < 0,
    }
    check_arguments(parser, problems)
    return args
