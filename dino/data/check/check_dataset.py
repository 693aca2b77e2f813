"""Check COCO-format data sets, and print or fix their issues."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino.data.coco import check_lists, load_json, no_objects
from dino.data.coco_values import short
from dino.utils.files import DataError, UserError, counted, resolve_inside, write_whole
from dino.utils.printable import printable

from .annotations import Contents, find_issues
from .corrections import Choices, correct
from .image_files import ImageFile, check_files, completed_jpeg, unlisted
from .issues import CURES, KINDS, Issue, count_errors
from .object_sizes import TINY, Resize, check_sizes, histogram, resized
from .repair import MAX_LOSS, repair
from .splits import Split, compare

DEFAULT_CHOICES = Choices()


class _Checked(NamedTuple):
    """A data set and its issues.

    Args:
        original, data: the parsed file, and its content after the corrections.
        sizes: of each object after resizing: the root of its area, in pixels.
    """

    path: Path
    original: dict[str, Any]
    data: dict[str, Any]
    split: Split
    issues: list[Issue]
    sizes: np.ndarray


def _check(
    path: Path, folder: Path, resize: Resize, *, open_images: bool = True, choices: Choices = DEFAULT_CHOICES
) -> _Checked:
    """Check one data set.

    Raises:
        DataError: the file is no COCO-format JSON, or the folder is missing.
    """
    original = load_json(path, "annotations")
    try:
        check_lists(original, path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not folder.is_dir():
        raise DataError(f"image folder not found: {folder}")
    data, issues, files = correct(original, folder, choices, f"open the images of {path.name}" if open_images else None)
    found, contents = find_issues(data, folder)
    issues += found
    images = [(i, entry) for i, entry in enumerate(data["images"]) if _is_sound(entry, contents)]
    opened = [files.get(i, ImageFile(problem="missing")) for i, _ in images] if open_images else None
    issues += _check_opened(images, opened or [], issues)
    sizes = resized(contents.objects, resize)
    issues += check_sizes(contents.objects, sizes)
    issues += _check_scores(data["annotations"])
    return _Checked(path, original, data, Split(folder, contents, images, opened), issues, sizes)


def _check_opened(images: list[tuple[int, dict]], opened: list[ImageFile], issues: list[Issue]) -> list[Issue]:
    """The issues of opened files, without the warning of an orientation that was decided."""
    settled = {issue.index for issue in issues if issue.kind.startswith("exif")}
    found = check_files(images, opened) if opened else ()
    return [issue for issue in found if issue.kind != "rotated" or issue.index not in settled]


def _check_scores(annotations: list) -> Iterator[Issue]:
    """Scores, as predictions have."""
    for index, entry in enumerate(annotations):
        if isinstance(entry, dict) and "score" in entry:
            yield Issue("score", "annotations", index, f"annotation {short(entry.get('id'))}: {short(entry['score'])}")


def _is_sound(entry: Any, contents: Contents) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) is int and contents.images.get(entry["id"]) is entry


def check_all(
    sets: Sequence[tuple[Path, Path]], resize: Resize, *, open_images: bool = True, choices: Choices = DEFAULT_CHOICES
) -> list[_Checked]:
    """Check training data and, if given, validation data, and compare the two.

    Args:
        sets: annotations and image folder of one or two data sets.
        choices: what a person decided about the files.

    Raises:
        DataError: see `_check`.
    """
    train, *val = checked = [
        _check(path, folder, resize, open_images=open_images, choices=choices) for path, folder in sets
    ]
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
    """Print numbers and issues of each data set, files that no data set lists, one table and one verdict.

    Args:
        show: how many issues of a kind to list.

    Returns:
        the number of errors.
    """
    for one in checked:
        print("\n".join([*_describe(one), *_list_issues(one.issues, show), ""]))
    if checked[0].split.files is not None:
        _print_unlisted(checked)
    errors = sum(count_errors(one.issues) for one in checked)
    warnings = sum(len(one.issues) for one in checked) - errors
    if errors or warnings:
        print("\n".join(_table(checked)))
    print(_verdict(errors, warnings, [issue for one in checked for issue in one.issues]))
    return errors


def _table(checked: Sequence[_Checked]) -> Iterator[str]:
    """A line for each kind of issue, with its number in each data set."""
    counts = [Counter(issue.kind for issue in one.issues) for one in checked]
    found = sum(counts, Counter())
    kinds = {name: kind for name, kind in KINDS.items() if found[name]}
    width = max(len(kind.title) for kind in kinds.values())
    heads = " ".join(f"{name:>10}" for name in (("training", "validation") if len(checked) > 1 else ("number",)))
    yield f"{'level':<8} {'issue':<{width}} {heads}  --fix"
    for name, kind in kinds.items():
        numbers = " ".join(f"{count[name]:>10,}" for count in counts)
        yield f"{kind.level:<8} {kind.title:<{width}} {numbers}  {CURES[kind.cure]}".rstrip()


def _verdict(errors: int, warnings: int, issues: list[Issue]) -> str:
    """One line: whether to train, and what to do first."""
    numbers = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
    if not errors:
        return f"verdict: ready to train ({numbers})" if warnings else "verdict: ready to train, no issues"
    found = {issue.kind for issue in issues if KINDS[issue.kind].level == "error"}
    undecided = any(KINDS[kind].cure is None for kind in found)
    how = "correct the files, then check again" if undecided else "--fix writes cleaned copies"
    if found == {"no_objects"} and any(issue.kind == "crowd" for issue in issues):
        how = "if each crowd region is one object, --crowd objects --fix"
    return f"verdict: not ready to train ({numbers}): {how}"


def _describe(checked: _Checked) -> list[str]:
    """Numbers of images, objects and classes, and the sizes of objects."""
    contents = checked.split.contents
    empty = len(contents.images) - len({o.image["id"] for o in contents.objects})
    lines = [
        f"{checked.path}: {len(checked.data['images'])} images ({empty} without objects), "
        f"{len(checked.data['annotations'])} objects, {len(checked.data['categories'])} classes"
    ]
    counts = histogram(contents)
    names = [printable(name, 30) for name in counts]
    width = max(map(len, names), default=0)
    top = max(counts.values(), default=0)
    rows = zip(names, counts.values(), strict=True)
    lines += [f"  {name:<{width}}  {_bar(count, top)} {count:,}" for name, count in rows]
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
    lines, by_kind = [], defaultdict(list)
    for issue in issues:
        by_kind[issue.kind].append(issue.text)
    for name, kind in KINDS.items():
        found = by_kind[name]
        if found:
            lines.append(f"{kind.level}: {kind.title} ({len(found):,}). {kind.advice}")
            lines += [f"  {printable(text, 400)}" for text in found[:show]]
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


def write_fixed(
    paths: Sequence[Path], checked: Sequence[_Checked], *, max_loss: float = MAX_LOSS, truncated: str = "drop"
) -> None:
    """Write cleaned copies of the annotations: all, or none.

    Args:
        paths: one for each of the first data sets.
        max_loss: fraction of the objects that may be dropped.
        truncated: "drop" the images of truncated files, or "keep" them: JPEG files are completed, in place.

    Raises:
        DataError: see `repair`.
        UserError: a copy can't be written.
    """
    copies = []
    for path, one in zip(paths, checked, strict=False):
        completed = _complete_files(one) if truncated == "keep" else {}
        issues = [issue for issue in one.issues if issue.kind != "truncated" or issue.index not in completed]
        copies.append((path, completed, repair(one.original, one.data, one.split.contents, issues, max_loss)))
    for path, completed, result in copies:
        for file, content in completed.values():
            write_whole(file, lambda part, content=content: part.write_bytes(content))
        text = json.dumps(result.data)
        write_whole(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        print(f"cleaned copy written to {path}: {'; '.join(result.describe())}")
        if completed:
            print(f"{counted(len(completed), 'truncated JPEG file')} completed with grey, in place")


def _complete_files(checked: _Checked) -> dict[int, tuple[Path, bytes]]:
    """Truncated JPEG files and their completed contents, by index of their image."""
    images, folder = checked.data["images"], checked.split.folder
    indices = [issue.index for issue in checked.issues if issue.kind == "truncated"]
    found = {index: completed_jpeg(resolve_inside(folder, images[index]["file_name"])) for index in indices}
    return {index: file for index, file in found.items() if file is not None}
