"""`dino eval`: AP, curves, best thresholds, confusions and the worst images of a checkpoint, in one report.html."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dino.cli import arguments, check_arguments, new_parser
from dino.utils.files import UsageError, UserError
from dino.utils.overrides import is_override
from dino.utils.paths import expand, find_data, find_file
from dino.utils.recipes import find_recipe

_EXAMPLES = """
examples:
  dino eval output/mine val.json images                (the best checkpoint of a run; or output/mine/model_final.pth)
  dino eval dino_r50_4scale_12ep val.json images       (published weights, downloaded once)
  dino eval model.pth --dataset coco_2017_val --num-gpus 2       (a data set that Detectron2 knows)
  dino eval checkpoint0011_4scale.pth val.json images            (a file of another program)
  dino eval --results detections.json val.json images            (of any program, no model)
  dino eval --results output/predictions/predictions.json val.json images
Data without annotations gives a page of predictions. A recipe is a program: run only recipes that you trust.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    usage = "CHECKPOINT ANNOTATIONS IMAGES [--output FOLDER] [more arguments] [key=value ...]"
    parser = new_parser("dino eval", __doc__, _EXAMPLES, usage=usage)
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="CHECKPOINT [ANNOTATIONS IMAGES] [key=value ...]",
        help="a checkpoint, the folder of a run or of transformers, an address, or a name of `dino weights`; "
        "JSON file in COCO format, and "
        "folder of its images; settings to change",
    )
    parser.add_argument(
        "--val", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="another way to name the data, as in `dino train`"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="detections in COCO's results format, or a predictions.json, instead of a checkpoint",
    )
    parser.add_argument("--dataset", help="name of a data set that Detectron2 knows, instead of files")
    parser.add_argument(
        "--config-file", default="", help="recipe, by name or file (default: what the checkpoint shows)"
    )
    parser.add_argument("--output", type=Path, help="folder for the report (default: a new one, output/evaluation)")
    parser.add_argument("--shown", type=int, default=24, help="how many images to draw (default %(default)s)")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="processes, one per GPU or, without one, on the CPU (default %(default)s)",
    )
    for old in ("--weights", "--val-json", "--val-images"):
        parser.add_argument(old, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = _parse(argv)
    if "LOCAL_RANK" in os.environ:
        raise UserError("`dino eval` starts its processes itself: write --num-gpus N instead of torchrun")

    from dino.evaluation.report import evaluate
    from dino.training.curves import run_curves

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
        evaluate.write_evaluation(folder, detected, args.shown, run_curves(detected.details.get("Weights")))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments: `weights`, `val_json`, `val_images` and `opts`, overrides alone, whichever form was used.

    Raises:
        UserError: one is missing, or another thing.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    _use_words(args)
    no_data = not any((args.results, args.config_file, args.val_json, args.dataset))
    problems = {
        "--dataset and data in files exclude each other": args.dataset and args.val_json,
        "--results needs the data: ANNOTATIONS IMAGES": args.results and not args.val_json,
        "name the data too: dino eval CHECKPOINT ANNOTATIONS IMAGES": args.weights and no_data,
        "name a checkpoint and data: dino eval CHECKPOINT ANNOTATIONS IMAGES": no_data,
        "--shown can't be negative": args.shown < 0,
        "--num-gpus must be positive": args.num_gpus < 1,
    }
    check_arguments(parser, problems)
    _find_files(args)
    return args


def _use_words(args: argparse.Namespace) -> None:
    """Divide the positional words into overrides, checkpoint and data.

    Raises:
        UsageError: see `_use_data`.
    """
    words = [word for word in args.opts if not is_override(word) or os.path.exists(word)]
    args.opts = [word for word in args.opts if word not in words]
    if words and not args.weights and not args.results:
        args.weights = words.pop(0)
    _use_data(args, words)


def _use_data(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Set `val_json` and `val_images` from the words after the checkpoint, or from either pair of flags.

    Raises:
        UsageError: one of two is missing, or there are more.
    """
    if len(words) not in (0, 2):
        form = "dino eval CHECKPOINT ANNOTATIONS IMAGES"
        raise UsageError(f"the data are two words, not {' '.join(words)}: write {form}, and settings as key=value")
    if words and args.val:
        raise UsageError("the data are named twice: after the checkpoint, and by --val")
    args.val_json, args.val_images = arguments.join_pairs(
        "val", list(words) or args.val, (args.val_json, args.val_images)
    )


def _find_files(args: argparse.Namespace) -> None:
    """Look for checkpoint, data and recipe.

    Raises:
        UserError: one is missing, or another thing.
    """
    if args.config_file:
        find_recipe(args.config_file)
    before = "dino eval --results FILE" if args.results else "dino eval CHECKPOINT"
    if args.weights:
        arguments.check_order(args.weights, *filter(None, (args.val_json, args.val_images)), before="dino eval")
        args.weights = arguments.find_checkpoint(args.weights)
    if args.val_json:
        args.val_json, args.val_images = find_data(args.val_json, args.val_images, before=before)
    if args.results:
        args.results = find_file(args.results, "detections", {".json"})
    if args.dataset and not arguments.is_installed("detectron2"):
        raise UserError("--dataset names data that Detectron2 knows, and it is not installed: give ANNOTATIONS IMAGES")
    args.output = args.output and Path(expand(args.output))
