"""`dino weights`: list the published weights that have a name, and fetch them.

A name stands for its file wherever weights are asked for.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dino.cli import check_arguments, new_parser

if TYPE_CHECKING:
    from dino.weights.published import NotRead, Published

_EXAMPLES = """
examples:
  dino weights                                     (all)
  dino weights swin                                (those with this word in their name)
  dino weights dino_r50_4scale_12ep                (all that is known of one)
  dino weights dino_r50_4scale_12ep --download     (fetch it now, for a machine without network later)
"""
_WIDTH = 80  # columns


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino weights", __doc__, _EXAMPLES)
    parser.add_argument("name", nargs="?", default="", help="a name, or a part of names to list")
    parser.add_argument("--download", action="store_true", help="fetch the file of this name, and print where it is")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb.

    Raises:
        DataError: no name has this word.
        UserError: the file can't be fetched.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, {"--download needs a name": args.download and not args.name})

    from dino.weights import locate
    from dino.weights.published import find

    if args.download:
        entry = find(args.name)
        print(locate(entry.name if entry else args.name))
    else:
        print("\n".join(_answer(args.name)))


def _answer(name: str) -> list[str]:
    """What is known of the entry with a name; a list of the entries with a word in their names.

    Raises:
        DataError: no name has this word.
    """
    from dino.weights import locate
    from dino.weights.published import NOT_READ, PUBLISHED, find

    if entry := find(name):
        return _describe(entry)
    if name in NOT_READ:
        return _describe_not_read(NOT_READ[name])
    chosen, others = ([e for key, e in table.items() if name in key] for table in (PUBLISHED, NOT_READ))
    if not chosen + others:
        locate(name)  # raises the error that names similar ones
    return _list(chosen, others)


def _find_here(entry: Published) -> Path | None:
    """The entry's file on this machine, downloaded or put there by hand; None where there is none."""
    from dino.weights.addresses import published_path
    from dino.weights.downloads import cached_path

    places = [published_path(entry), *([cached_path(entry.address)] if entry.address else [])]
    return next((place for place in places if place.is_file()), None)


def _megabytes(entry: Published, here: Path | None) -> int:
    """The size of the file that is here; else the published one, or that of the tensors."""
    return round((here.stat().st_size if here else entry.size or entry.megabytes * 10**6) / 1e6)


def _list(entries: Sequence[Published], not_read: Sequence[NotRead]) -> list[str]:
    """One line for each, and what the columns mean."""
    from dino.utils.files import counted
    from dino.weights.downloads import cache_folder

    width = max(len(entry.name) for entry in (*entries, *not_read))
    lines, sizes = [f"{'name':<{width}}    AP    MB  whose        file"], []
    for entry in entries:
        here = _find_here(entry)
        size = _megabytes(entry, here)
        sizes += [size] if here else []
        state = "in cache" if here else "download" if entry.address else "by hand"
        whose = "official" if entry.format == "official" else entry.owner
        lines.append(f"{entry.name:<{width}}  {entry.ap:.1f}  {size:>4}  {whose:<11}  {state}")
    lines += [f"{e.name:<{width}}  {e.ap:.1f}     -  {e.owner:<11}  not read" for e in not_read]
    return [
        *lines,
        "",
        "AP: of boxes on COCO val2017, as published. MB: of the file that is in the cache,",
        "else of its tensors; the file may hold more.",
        f"{counted(len(sizes), 'file')} with {sum(sizes)} MB in the cache: {cache_folder()}",
        *(["not read: this project does not have the file's backbone."] if not_read else []),
        "`dino weights NAME` says more.",
        *(["A name is used as a file is:", f"  dino predict {entries[0].name} photo.jpg"] if entries else []),
    ]


def _describe(entry: Published) -> list[str]:
    """All that is known of one entry."""
    here = _find_here(entry)
    facts = {
        "AP": f"{entry.ap} on COCO val2017",
        "whose": f"{entry.owner}, {entry.licence}",
        "recipe": entry.recipe,
        "format": entry.format,
        "classes": f"{entry.num_classes}" + (" (COCO's raw ids)" if entry.num_classes == 91 else ""),
        "heads": "one pair for all decoder layers" if entry.shared_heads else "a pair for each decoder layer",
        "position encoding": f"temperature {entry.temperature:g}, offset {entry.offset:g}",
        "size": f"{'' if here or entry.size else 'at least '}{_megabytes(entry, here)} MB",
        "SHA-256": entry.sha256,
        "address": entry.address,
        "page": entry.page,
        "note": entry.note,
        "file": _describe_file(entry, here),
    }
    return _lines_of(entry.name, facts)


def _describe_not_read(entry: NotRead) -> list[str]:
    """What is known of a file that this project can't use."""
    facts = {
        "AP": f"{entry.ap} on COCO val2017",
        "whose": entry.owner,
        "backbone": entry.backbone,
        "address": entry.address,
        "note": entry.note,
        "not read": entry.reason,
    }
    return _lines_of(entry.name, facts)


def _lines_of(name: str, facts: Mapping[str, str]) -> list[str]:
    """A name, and below it a line for each fact that is known."""
    width = max(map(len, facts)) + 4
    return [name, *(f"  {key:<{width - 2}}{_wrap(fact, width)}" for key, fact in facts.items() if fact)]


def _describe_file(entry: Published, here: Path | None) -> str:
    """Where the file is, or how it gets here."""
    from dino.weights.addresses import published_path

    if here:
        return str(here)
    if entry.address:
        return "not here: fetched when it is used, or by --download"
    return f"not here: get {entry.file} from the page and put it into {published_path(entry)}"


def _wrap(text: str, indent: int) -> str:
    """Break a text between words; addresses and paths stay whole."""
    lines = textwrap.wrap(text, _WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines)
