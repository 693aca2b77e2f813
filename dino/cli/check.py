"""`dino check`: check a COCO-format data set before training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dino.cli import arguments, check_arguments, new_parser
from dino.utils.paths import expand, find_data

_EXAMPLES = """
examples:
  dino check train.json images
  dino check train.json images --val val.json --preview preview.html
  dino check train.json images --val val.json --fix train_clean.json val_clean.json
  dino check train.json images --weights model_final.pth --label-errors errors.json     (what a model doubts)
  dino check train.json images --halves halves     (prints how to train two models that each judge the other half)
  dino check instances_train2017.json train2017 --no-images     (annotations only: seconds instead of minutes)
Errors make the exit code 1. Warnings leave it 0, but deserve a look.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino check", __doc__, _EXAMPLES)
    parser.add_argument("annotations", metavar="ANNOTATIONS", type=Path, help="JSON file in COCO format")
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder of its images")
    parser.add_argument(
        "--val",
        nargs="+",
        type=Path,
        metavar=("ANNOTATIONS", "IMAGES"),
        help="validation data, checked too and compared; the folder may be left out if both share it",
    )
    parser.add_argument("--no-images", action="store_true", help="don't open the image files")
    parser.add_argument("--preview", type=Path, metavar="OUT.html", help="write a page of images with their boxes")
    parser.add_argument("--sheet", type=Path, dest="preview", help=argparse.SUPPRESS)
    parser.add_argument("--show", type=int, default=20, help="how many issues of a kind to list (default %(default)s)")
    parser.add_argument("--size", type=int, default=800, help="short side in training, pixels (default %(default)s)")
    parser.add_argument("--max-size", type=int, default=1333, help="bound of the long side (default %(default)s)")
    _add_fixing(parser)
    _add_label_errors(parser)
    return parser


def _add_fixing(parser: argparse.ArgumentParser) -> None:
    """The arguments of a cleaned copy."""
    group = parser.add_argument_group("a cleaned copy")
    group.add_argument(
        "--fix",
        nargs="+",
        type=Path,
        metavar=("OUT.json", "OUT_VAL.json"),
        help="write a cleaned copy of the annotations, and of those of --val",
    )
    group.add_argument(
        "--max-loss",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the objects that --fix may drop; 1 for any (default %(default)s)",
    )
    group.add_argument(
        "--crowd",
        choices=("ignore", "objects"),
        default="ignore",
        help="`objects`: crowd regions (iscrowd=1) are objects, as CVAT means its masks; --fix writes iscrowd 0",
    )
    group.add_argument(
        "--exif",
        choices=("upright", "stored"),
        help="the picture that boxes were drawn on, of files with an EXIF rotation (default: where they fit)",
    )
    group.add_argument(
        "--truncated",
        choices=("drop", "keep"),
        default="drop",
        help="`keep`: --fix completes truncated JPEG files, in place, with grey (default %(default)s)",
    )


def _add_label_errors(parser: argparse.ArgumentParser) -> None:
    """The arguments of label errors that a model finds."""
    group = parser.add_argument_group("likely label errors")
    group.add_argument(
        "--weights",
        nargs="+",
        type=Path,
        metavar="MODEL",
        help="list likely label errors: one checkpoint, or with --halves those trained on half_a.json and half_b.json",
    )
    group.add_argument(
        "--halves",
        type=Path,
        metavar="FOLDER",
        help="write half_a.json and half_b.json to train on; with --weights, each model judges the other half",
    )
    group.add_argument(
        "--label-errors",
        type=Path,
        metavar="OUT.json",
        help="write the likely label errors in COCO format, and drawn to OUT.html",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb. Returns the exit code."""
    args = _parse(argv)

    from dino.data.check import check_dataset
    from dino.evaluation.report.preview import write_preview

    drawn = args.label_errors and args.label_errors.with_suffix(".html")
    check_dataset.refuse_existing(*(args.fix or ()), args.preview, args.label_errors, drawn)
    resize = check_dataset.Resize(args.size, args.max_size)
    files = [(args.annotations, args.images), *([args.val] if args.val else [])]
    choices = check_dataset.Choices(args.crowd, args.exif)
    checked = check_dataset.check_all(files, resize, open_images=not args.no_images, choices=choices)
    train = checked[0]
    errors = check_dataset.print_report(checked, args.show)
    if args.preview:
        write_preview(args.preview, train.path.name, train.split, train.issues)
        print(f"preview written to {args.preview}")
    if args.fix:
        check_dataset.write_fixed(args.fix, checked, max_loss=args.max_loss, truncated=args.truncated)
    if args.weights or args.halves:
        _look_for_label_errors(args, errors)
    return int(errors > 0)


def _look_for_label_errors(args: argparse.Namespace, errors: int) -> None:
    """Write halves, or list, draw and export likely label errors; neither where the annotations have errors."""
    if errors:
        print("no label errors were looked for: correct the errors above first, for example with --fix")
        return
    from dino.evaluation import held_out
    from dino.evaluation.report.label_sheet import write_label_errors

    if args.weights:
        data, found = held_out.find_by_models(args.annotations, args.images, args.weights, args.halves)
        write_label_errors(args.label_errors, args.annotations.name, data, found, args.images, args.show)
    else:
        held_out.write_halves(args.annotations, args.images, args.halves)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    problems = {
        "--val takes one JSON file and at most one folder": args.val and len(args.val) > 2,
        "--fix takes one file, or two with --val": args.fix and len(args.fix) > 1 + bool(args.val),
        "--max-loss must be in [0, 1]": not 0 <= args.max_loss <= 1,
        "--weights takes one model, or two with --halves": args.weights and len(args.weights) != 1 + bool(args.halves),
        "--label-errors needs --weights": args.label_errors and not args.weights,
        "--label-errors names a JSON file, such as errors.json": args.label_errors
        and args.label_errors.suffix != ".json",
        "--size, --max-size and --show must be positive": min(args.size, args.max_size, args.show) < 1,
    }
    check_arguments(parser, problems)
    _find_files(args)
    return args


def _find_files(args: argparse.Namespace) -> None:
    """Look for the data and the models.

    Raises:
        UsageError: one is missing, or another thing.
    """
    args.annotations, args.images = map(Path, find_data(args.annotations, args.images, before="dino check"))
    if args.val:
        pair = (args.val[0], args.val[1] if len(args.val) == 2 else args.images)
        args.val = tuple(map(Path, find_data(*pair, before="--val")))
    args.weights = args.weights and [Path(arguments.find_checkpoint(str(path))) for path in args.weights]
    for name in ("preview", "label_errors", "halves"):
        path = getattr(args, name)
        setattr(args, name, path and Path(expand(path)))
