"""Check COCO-format data sets, and print or fix their issues."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino.data.coco import check_lists, load_json, no_objects
from dino.utils.files import DataError, UserError, counted, write_whole

from .annotations import Contents, find_issues
from .image_files import check_files, read_files, unlisted
from .issues import KINDS, Issue, count_errors
from .object_sizes import TINY, Resize, check_sizes, histogram, resized
from .repair import repair
from .splits import Split, compare


class _Checked(NamedTuple):
    """A data set and its issues.

    Args:
        data: the parsed file.
        sizes: of each object after resizing: the root of its area, in pixels.
    """

    path: Path
    data: dict[str, Any]
    split: Split
    issues: list[Issue]
    sizes: np.ndarray


def _check(path: Path, folder: Path, resize: Resize, *, open_images: bool = True) -> _Checked:
    """Check one data set.

    Raises:
        DataError: the file is no COCO-format JSON, or the folder is missing.
    """
    data = load_json(path, "annotations")
    try:
        check_lists(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not folder.is_dir():
        raise DataError(f"image folder not found: {folder}")
    issues, contents = find_issues(data, folder)
    images = [(i, entry) for i, entry in enumerate(data["images"]) if _is_sound(entry, contents)]
    files = None
    if open_images:
        start = time.perf_counter()
        files = read_files([entry for _, entry in images], folder, f"open the images of {path.name}")
        seconds = time.perf_counter() - start
        print(f"{path.name}: {len(files)} images opened in {seconds:.1f} s, {len(files) / seconds:.0f} images/s")
        issues += check_files(images, files)
    sizes = resized(contents.objects, resize)
    issues += check_sizes(contents.objects, sizes)
    return _Checked(path, data, Split(folder, contents, images, files), issues, sizes)


def _is_sound(entry: Any, contents: Contents) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) is int and contents.images.get(entry["id"]) is entry


def check_all(sets: Sequence[tuple[Path, Path]], resize: Resize, *, open_images: bool = True) -> list[_Checked]:
    """Check training data and, if given, validation data, and compare the two.

    Args:
        sets: annotations and image folder of one or two data sets.

    Raises:
        DataError: see `_check`.
    """
    train, *val = checked = [_check(path, folder, resize, open_images=open_images) for path, folder in sets]
    for one, kind in zip(checked, ("no_objects", "no_val_objects"), strict=False):
        one.issues.extend(_check_objects(one, kind))
    for other in val:
        train.issues.extend(compare(train.split, other.split))
    return checked


def _check_objects(checked: _Checked, kind: str) -> Iterator[Issue]:
    """The issue of a data set whose annotations are all crowd regions or boxes without area, or that has none."""
    entries = [o.entry for o in checked.split.contents.objects]
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=bool)
    usable = int((~crowd & (checked.sizes > 0)).sum())
    text = no_objects(checked.path, len(checked.data["images"]), entries, usable)
    if text:
        yield Issue(kind, "annotations", 0, text)


def print_report(checked: Sequence[_Checked], show: int) -> int:
    """Print numbers and issues of each data set, and the image files that no data set lists.

    Args:
        show: how many issues of a kind to list.

    Returns:
        the number of errors.
    """
    total = 0
    for one in checked:
        print("\n".join([*_describe(one), *_list_issues(one.issues, show)]))
        errors = count_errors(one.issues)
        total += errors
        counts = f"{one.path}: {counted(errors, 'error')}, {counted(len(one.issues) - errors, 'warning')}\n"
        print(counts if one.issues else "no issues\n")
    if checked[0].split.files is not None:
        _print_unlisted(checked)
    return total


def _describe(checked: _Checked) -> list[str]:
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
    lines += [f"  {name:<{width}}  {_bar(count, top)} {count:,}" for name, count in counts.items()]
    sizes = checked.sizes[checked.sizes > 0]
    if sizes.size:
        low, median, high = np.percentile(sizes, [5, 50, 95])
        lines.append(f"  objects after resizing: median {median:.0f} pixels, nine of ten {low:.0f} to {high:.0f}")
        if median < TINY:
            lines.append("  more than half of them are tiny: train at a larger size, or with tiles")
    return lines


def _bar(count: int, top: int, width: int = 30) -> str:
    """A bar of text, `width` long for `top`; never empty for a positive count."""
    return "█" * max(round(width * count / top), 1) if count else "·"


def _list_issues(issues: list[Issue], show: int) -> list[str]:
    """Each kind of issue, errors first, with its first entries."""
    lines = []
    for name, kind in KINDS.items():
        found = [issue.text for issue in issues if issue.kind == name]
        if found:
            lines.append(f"{kind.level}: {kind.title} ({len(found):,}). {kind.advice}")
            lines += [f"  {text}" for text in found[:show]]
            lines += [f"  … and {len(found) - show:,} more"] if len(found) > show else []
    return lines


def _print_unlisted(checked: Sequence[_Checked]) -> None:
    """Print which image files no annotation lists."""
    for folder in dict.fromkeys(c.split.folder for c in checked):
        entries = [e for c in checked if c.split.folder == folder for e in c.data["images"] if isinstance(e, dict)]
        known = {str(Path(e["file_name"])) for e in entries if isinstance(e.get("file_name"), str)}
        found = unlisted(folder, known)
        if found:
            images = counted(len(found), "image")
            print(f"note: training ignores {images} in {folder} that no annotations list, such as {found[0]}\n")


def refuse_existing(*paths: Path | None) -> None:
    """Raise a UserError if an output exists."""
    for path in paths:
        if path is not None and path.exists():
            raise UserError(f"{path} exists: choose another name")


def write_fixed(path: Path, checked: _Checked) -> None:
    """Write a cleaned copy of the annotations.

    Raises:
        DataError: see `repair`.
        UserError: the copy can't be written.
    """
    fixed, changes = repair(checked.data, checked.split.contents, checked.issues)
    write_whole(path, lambda part: part.write_text(json.dumps(fixed), encoding="utf-8"))
    print(f"cleaned copy written to {path}: {', '.join(changes) or 'no changes'}")
