"""`dino check`: look a COCO-format data set over before training."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino.data.coco import check_lists, load_json
from dino.utils.files import DataError, counted, write_whole

from .annotations import Contents, find_faults
from .image_files import check_pictures, look_at_all, unlisted
from .issues import KINDS, Fault, count_errors
from .object_sizes import Resize, check_sizes, histogram, resized
from .preview import write_sheet
from .repair import repair
from .splits import Split, compare

EXAMPLE = """
examples:
  dino check train.json images
  dino check train.json images --val val.json --sheet sample.html --fix cleaned.json
  dino check instances_train2017.json train2017 --no-images     (annotations only: seconds instead of minutes)
The exit code is 1 where there are errors. Warnings are worth a look, and leave it 0.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dino check", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="JSON file in COCO format")
    parser.add_argument("images", type=Path, help="folder of its images")
    parser.add_argument(
        "--val",
        nargs="+",
        type=Path,
        metavar=("JSON", "FOLDER"),
        help="validation data, checked too and compared; its folder may be left out if it is the same",
    )
    parser.add_argument("--no-images", action="store_true", help="don't open the image files")
    parser.add_argument("--fix", type=Path, metavar="OUT.json", help="write a cleaned copy of the annotations")
    parser.add_argument("--sheet", type=Path, metavar="OUT.html", help="write a page of images with their boxes")
    parser.add_argument("--show", type=int, default=20, help="how many of each fault to list (default %(default)s)")
    parser.add_argument("--size", type=int, default=800, help="short side in training, pixels (default %(default)s)")
    parser.add_argument("--max-size", type=int, default=1333, help="bound of the long side (default %(default)s)")
    args = parser.parse_args(argv)
    if args.val and len(args.val) > 2:
        parser.error("--val takes one JSON file and at most one folder")
    if min(args.size, args.max_size) < 1 or args.show < 1:
        parser.error("--size, --max-size and --show must be positive")
    return args


class Checked(NamedTuple):
    """A data set, what was found in it, and how its objects are sized after resizing (root of the area, pixels)."""

    path: Path
    data: dict[str, Any]
    split: Split
    faults: list[Fault]
    sizes: np.ndarray


def check(path: Path, folder: Path, resize: Resize, open_images: bool) -> Checked:
    """Look one data set over.

    Raises:
        DataError: the file is no COCO-format JSON at all, or the folder is missing.
    """
    data = load_json(path, "annotations")
    try:
        check_lists(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not folder.is_dir():
        raise DataError(f"image folder not found: {folder}")
    faults, contents = find_faults(data, folder)
    images = [(i, entry) for i, entry in enumerate(data["images"]) if is_sound(entry, contents)]
    pictures = None
    if open_images:
        start = time.perf_counter()
        pictures = look_at_all([entry for _, entry in images], folder, f"open the images of {path.name}")
        seconds = time.perf_counter() - start
        print(f"{path.name}: {len(pictures)} images opened in {seconds:.1f} s, {len(pictures) / seconds:.0f} images/s")
        faults += check_pictures(images, pictures)
    sizes = resized(contents.objects, resize)
    faults += check_sizes(contents.objects, sizes)
    return Checked(path, data, Split(folder, contents, images, pictures), faults, sizes)


def is_sound(entry: Any, contents: Contents) -> bool:
    """Whether an entry of the list of images is one of the sound ones."""
    return isinstance(entry, dict) and type(entry.get("id")) is int and contents.images.get(entry["id"]) is entry


def describe(checked: Checked) -> list[str]:
    """Numbers of images, objects and classes, and the sizes of objects."""
    contents = checked.split.contents
    empty = len(contents.images) - len({o.image["id"] for o in contents.objects})
    lines = [
        f"{checked.path}: {len(checked.data['images'])} images ({empty} without objects), "
        f"{len(checked.data['annotations'])} objects, {len(checked.data['categories'])} classes"
    ]
    counts = histogram(contents)
    width = max((len(name) for name in counts), default=0)
    top = max(counts.values(), default=0)
    lines += [f"  {name:<{width}}  {bar(count, top)} {count:,}" for name, count in counts.items()]
    sizes = checked.sizes[checked.sizes > 0]
    if sizes.size:
        low, middle, high = np.percentile(sizes, [5, 50, 95])
        lines.append(f"  objects after resizing: median {middle:.0f} pixels, nine of ten {low:.0f} to {high:.0f}")
        if middle < 8:
            lines.append("  more than half of them are tiny: train at a larger size, or with tiles")
    return lines


def bar(count: int, top: int, width: int = 30) -> str:
    """A bar of text, as long as `count` is of `top`; never empty for a positive count."""
    return "█" * max(round(width * count / top), 1) if count else "·"


def list_faults(faults: list[Fault], show: int) -> list[str]:
    """Every kind that was found, errors first, each with its first offenders."""
    lines = []
    for name, kind in KINDS.items():
        found = [fault.text for fault in faults if fault.kind == name]
        if found:
            lines.append(f"{kind.level}: {kind.title} ({len(found):,}). {kind.advice}")
            lines += [f"  {text}" for text in found[:show]]
            lines += [f"  … and {len(found) - show:,} more"] if len(found) > show else []
    return lines


def report(checked: Checked, show: int) -> None:
    """Print what was found in one data set."""
    print("\n".join([*describe(checked), *list_faults(checked.faults, show)]))
    errors = count_errors(checked.faults)
    warnings = len(checked.faults) - errors
    found = f"{checked.path}: {counted(errors, 'error')}, {counted(warnings, 'warning')}\n"
    print(found if checked.faults else "nothing wrong\n")


def note_unlisted(sets: list[Checked]) -> None:
    """Print which image files of the folders no annotation lists."""
    for folder in dict.fromkeys(s.split.folder for s in sets):
        listed = [e for s in sets if s.split.folder == folder for e in s.data["images"] if isinstance(e, dict)]
        known = {str(Path(e["file_name"])) for e in listed if isinstance(e.get("file_name"), str)}
        found = unlisted(folder, known)
        if found:
            print(f"note: {len(found)} images in {folder} are not listed and will not be used, first {found[0]}\n")


def refuse_taken(*paths: Path | None) -> None:
    """Raise a DataError where an output exists."""
    for path in paths:
        if path is not None and path.exists():
            raise DataError(f"{path} exists: choose another name")


def main(argv: Sequence[str] | None = None) -> int:
    """The verb. Returns the exit code."""
    args = parse_arguments(argv)
    refuse_taken(args.fix, args.sheet)
    resize = Resize(args.size, args.max_size)
    sets = [check(args.annotations, args.images, resize, not args.no_images)]
    if args.val:
        folder = args.val[1] if len(args.val) == 2 else args.images
        sets.append(check(args.val[0], folder, resize, not args.no_images))
        sets[0].faults.extend(compare(sets[0].split, sets[1].split))
    for checked in sets:
        report(checked, args.show)
    if not args.no_images:
        note_unlisted(sets)
    if args.sheet:
        write_sheet(args.sheet, sets[0].path.name, sets[0].split, sets[0].faults)
        print(f"sheet written to {args.sheet}")
    if args.fix:
        fixed, changes = repair(sets[0].data, sets[0].split.contents, sets[0].faults)
        write_whole(args.fix, lambda part: part.write_text(json.dumps(fixed), encoding="utf-8"))
        print(f"cleaned copy written to {args.fix}: {', '.join(changes) or 'nothing was to be changed'}")
    return 1 if any(count_errors(checked.faults) for checked in sets) else 0
