"""A COCO file of those pictures alone whose objects are all annotated, or all but a few.

    python benchmarks/complete_pictures.py test.json benchmarks/bccd_complete.json test_few.json --split test --most 5

In many pictures of BCCD some cells, or all red cells, have no box: a detector that finds them is counted wrong. The
list says how many objects of each picture have no box, by eye, and holds the rule of that count.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from dino.data.coco import read_annotations  # noqa: E402
from dino.utils.files import DataError, UserError, counted, write_whole  # noqa: E402


def read_counts(path: Path, split: str) -> dict[str, int]:
    """Read the objects without a box of each picture of a split, by file name.

    Raises:
        DataError: the list is missing or broken, lacks the split, or a count is not a whole number of at least 0.
    """
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["missing"]
        known = ", ".join(sorted(splits))
    except FileNotFoundError:
        raise DataError(f"list not found: {path}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f'can\'t read the list {path}: it must be JSON such as {{"missing": {{"test": …}}}}') from error
    counts = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(counts, dict):
        raise DataError(f"{path} has no split {split!r}; it has: {known}")
    wrong = [name for name, count in counts.items() if type(count) is not int or count < 0]
    if wrong:
        raise DataError(f"{path}: the count of {wrong[0]} must be a whole number of at least 0")
    return counts


def select(data: dict, counts: dict[str, int], most: int) -> dict:
    """Keep the pictures that lack at most so many boxes, and their annotations. Ids stay as they are.

    Args:
        data: parsed annotations in COCO format.
        counts: objects without a box, by file name.
        most: the largest count that is kept; 0 keeps complete pictures.

    Raises:
        DataError: list and annotations name different pictures, or no picture has so few objects without a box.
    """
    names = {image["file_name"] for image in data["images"]}
    for name in sorted(names ^ counts.keys()):
        lacking = "list" if name in names else "annotations"
        raise DataError(f"{name} is not in the {lacking}: they must be of the same split")
    images = [image for image in data["images"] if counts[image["file_name"]] <= most]
    if not images:
        least = min(counts.values(), default=0)
        raise DataError(f"every picture lacks more than {counted(most, 'box', 'boxes')}: give --most {least} or more")
    ids = {image["id"] for image in images}
    return {**data, "images": images, "annotations": [a for a in data["annotations"] if a["image_id"] in ids]}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="file of the split in COCO format")
    parser.add_argument("list", type=Path, help="objects without a box of each picture, such as bccd_complete.json")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--split", default="test", help="which split of the list (default %(default)s)")
    parser.add_argument("--most", type=int, default=0, help="boxes that a picture may lack (default 0: complete)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        if args.output.resolve() in (args.annotations.resolve(), args.list.resolve()):
            raise UserError(f"{args.output} is an input: name another file for the output")
        data = read_annotations(args.annotations, args.annotations.parent)
        kept = select(data, read_counts(args.list, args.split), args.most)
        write_whole(args.output, lambda path: path.write_text(json.dumps(kept)))
    except UserError as error:
        sys.exit(f"error: {error}")
    sizes = [counted(len(kept["images"]), "picture"), counted(len(kept["annotations"]), "object")]
    print(f"{' with '.join(sizes)} of {len(data['images'])} with {len(data['annotations'])}: {args.output}")


if __name__ == "__main__":
    main()
