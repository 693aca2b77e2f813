"""`dino data`: convert annotations of other programs, merge data sets, split one."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino.cli import check_arguments, new_parser

if TYPE_CHECKING:
    from dino.data.importers.source import Source

_EXAMPLES = """
examples:
  dino data import yolo_folder train.json --val val.json      (also Pascal VOC, labelme, CVAT, Label Studio, CreateML)
  dino data import annotations.xml train.json --val val.json --val-fraction 0.2
  dino data merge a.json images_a b.json images_b all.json
  dino data split all.json images train.json val.json
  dino data split all.json images train.json val.json --val-first 5000
Nothing that exists is replaced. Images that are nearly the same stay on one side of a split.
"""
_FRACTION = 0.2


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino data", __doc__, _EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import|merge|split")
    add = verbs.add_parser("import", help="convert annotations of another program, and check them")
    add.add_argument("source", type=Path, help="file or folder; its format is recognised")
    add.add_argument("output", type=Path, help="JSON file in COCO format to write")
    add.add_argument("--images", type=Path, help="folder of the images (default: where the program puts them)")
    add.add_argument("--val", type=Path, metavar="VAL.json", help="write validation data too: the source's, or a split")
    _add_split(add)
    merge = verbs.add_parser("merge", help="join two data sets in COCO format")
    for letter in "ab":
        merge.add_argument(f"json_{letter}", type=Path, help="annotations")
        merge.add_argument(f"images_{letter}", type=Path, help="folder of their images")
    merge.add_argument("output", type=Path, help="JSON file to write")
    split = verbs.add_parser("split", help="divide a data set in COCO format into training and validation data")
    split.add_argument("annotations", type=Path, help="JSON file in COCO format")
    split.add_argument("images", type=Path, help="folder of its images")
    split.add_argument("output", type=Path, help="training data to write")
    split.add_argument("val", type=Path, help="validation data to write")
    _add_split(split)
    split.add_argument(
        "--val-first", type=int, metavar="N", help="the first N images of the file for validation, instead of a draw"
    )
    return parser


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=_FRACTION,
        metavar="FRACTION",
        help="of the images, for validation (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default %(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb. Returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    fraction = getattr(args, "val_fraction", _FRACTION)
    val, first = getattr(args, "val", None), getattr(args, "val_first", None)
    problems = {
        "--val-fraction must be between 0 and 1": not 0 < fraction < 1,
        "--seed must not be negative": getattr(args, "seed", 0) < 0,
        "--val-first must be at least 1": first is not None and first < 1,
        "training and validation data need files of their own": val is not None
        and val.absolute() == args.output.absolute(),
    }
    check_arguments(parser, problems)

    from dino.data.check.check_dataset import refuse_existing

    refuse_existing(args.output, val)
    return {"import": _import, "merge": _merge, "split": _split}[args.verb](args)


def _import(args: argparse.Namespace) -> int:
    """Convert, write, check."""
    from dino.data.importers.read_source import read_source
    from dino.data.importers.source import to_coco

    sources = read_source(args.source, args.images)
    train = sources.get("train") or next(iter(sources.values()))
    written = [(args.output, train.folder, to_coco(train))]
    if args.val and "val" in sources:
        written.append((args.val, sources["val"].folder, to_coco(sources["val"])))
    elif args.val:
        written = _divide(written[0][2], train.folder, args)
    _write(written)
    _print_left_out(sources, {"train", *(["val"] if args.val else [])})
    return _check(written)


def _print_left_out(sources: dict[str, Source], imported: set[str]) -> None:
    """Lines about the parts of a source that were not imported, or are missing."""
    from dino.utils.files import counted, printable

    left = sorted(set(sources) - imported)
    if left:
        print(f"not imported: {', '.join(left)}{' (--val VAL.json writes val)' if 'val' in left else ''}")
    for note in chain.from_iterable(source.notes for source in sources.values()):
        print(f"note: {printable(note, None)}")
    unlabelled = sum(source.unlabelled for source in sources.values())
    if unlabelled:
        print(f"left out: {counted(unlabelled, 'image')} that nobody has annotated")
    shapes = sum(image.left_out for source in sources.values() for image in source.images)
    if shapes:
        print(f"left out: {counted(shapes, 'shape')} without a box, such as points and lines")


def _divide(data: dict[str, Any], folder: Path, args: argparse.Namespace) -> list[tuple[Path, Path, dict]]:
    """Training and validation data: path, image folder and content of each."""
    from dino.data.coco import take_images
    from dino.data.near_duplicates import choose_validation, group_near_duplicates
    from dino.utils.files import DataError, counted

    if len(data["images"]) < 2:
        raise DataError("one image can't be split into training and validation data")
    groups = group_near_duplicates(data["images"], folder)
    chosen = choose_validation(data, groups, args.val_fraction, args.seed)
    rest = {image["id"] for image in data["images"]} - chosen
    if not chosen or not rest:
        raise DataError(
            "can't split: the images are too alike, or each has the only objects of a class. Split the file by hand"
        )
    twins = len(groups) - len(set(groups))
    print(
        f"{len(rest):,} images to train on, {len(chosen):,} for validation; "
        f"{counted(twins, 'near-duplicate')} kept on the side of their twin"
    )
    return [(args.output, folder, take_images(data, rest)), (args.val, folder, take_images(data, chosen))]


def _write(written: Sequence[tuple[Path, Path, dict]]) -> None:
    from dino.utils.files import counted, write_whole

    for path, folder, data in written:
        write_whole(path, lambda part, data=data: part.write_text(json.dumps(data), encoding="utf-8"))
        numbers = f"{counted(len(data['images']), 'image')}, {counted(len(data['annotations']), 'object')}"
        print(f"{path}: {numbers}; images in {folder}")


def _check(written: Sequence[tuple[Path, Path, dict]]) -> int:
    """Check what was written, and print the command that trains on it."""
    from dino.data.check import check_dataset

    checked = check_dataset.check_all([(path, folder) for path, folder, _ in written], check_dataset.Resize())
    errors = check_dataset.print_report(checked, 5)
    print(f"next: {_next_command(written)}")
    return int(errors > 0)


def _next_command(written: Sequence[tuple[Path, Path, dict]]) -> str:
    """The command that trains, or that splits validation data off."""
    words = [(shlex.quote(str(path)), shlex.quote(str(folder))) for path, folder, _ in written]
    if len(words) == 1:
        return f"dino data split {' '.join(words[0])} TRAIN.json VAL.json"
    (train, train_images), (val, val_images) = words
    return (
        f"dino train dino_r18_small_data --train {train} {train_images} --val {val} {val_images} --output output/mine"
    )


def _merge(args: argparse.Namespace) -> int:
    from dino.data.coco import read_annotations
    from dino.data.merging import merge_annotations

    pairs = ((args.json_a, args.images_a), (args.json_b, args.images_b))
    data, folder = merge_annotations([(read_annotations(path, images), images) for path, images in pairs])
    _write([(args.output, folder, data)])
    return 0


def _split(args: argparse.Namespace) -> int:
    from dino.data.coco import read_annotations

    data = read_annotations(args.annotations, args.images)
    _write(_divide(data, args.images, args) if args.val_first is None else _cut(data, args))
    return 0


def _cut(data: dict[str, Any], args: argparse.Namespace) -> list[tuple[Path, Path, dict]]:
    """As `_divide`, with the first images of the file for validation, in its order."""
    from dino.data.coco import take_images
    from dino.utils.files import DataError

    ids = [image["id"] for image in data["images"]]
    if args.val_first >= len(ids):
        raise DataError(f"--val-first {args.val_first} leaves nothing to train on: {args.annotations} has {len(ids)}")
    return [
        (path, args.images, take_images(data, set(part)))
        for path, part in ((args.output, ids[args.val_first :]), (args.val, ids[: args.val_first]))
    ]
