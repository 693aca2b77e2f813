"""The page about one set of detections."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import figure as plot

from dino.data.coco import classes_of
from dino.evaluation.label_errors import find_label_errors
from dino.inference.palette import colour_of
from dino.structures import SCORE_THRESH
from dino.utils.files import DataError, resolve_inside

from .charts import draw_charts, to_svg
from .error_analysis import COLUMNS, ERROR_WORDS, THRESHOLDS, Analysis, Found, Object, analyse, confusion, show
from .label_sheet import draw_label_errors, write_proposals
from .page import Figure, Mark, draw, write_page

_LOWEST = float(THRESHOLDS[0])  # least score that is drawn; start of the slider
_MOST_MARKS, _MOST_OBJECTS = 300, 1000  # detections and objects drawn in one image
_MOST_CLASSES = 25  # rows of the confusion matrix
_DRAWN_SET, _MOST_DRAWN = "images.html", 100  # the page of the set, its images
_DOUBTS_SHOWN = 6  # label errors of a kind
_MOST_PAIRS = 8  # of confused classes, named above the matrix
_WORDS = {"found": "right", "missed": "missed", **ERROR_WORDS}
_GROUPS = {"missed": ("missed",), "false": ("false", "duplicate"), "misplaced": ("misplaced", "confused")}


class _Cell(NamedTuple):
    """A cell of the confusion matrix: its number, and its share of the row as colour."""

    count: int
    share: float
    hue: str
    title: str


def image_paths(data: dict[str, Any], folder: str | Path) -> dict[int, Path]:
    """The file of each image id.

    Raises:
        DataError: a name leaves the folder.
    """
    return {image["id"]: resolve_inside(folder, image["file_name"]) for image in data["images"]}


def write_report(
    path: str | Path,
    *,
    data: dict[str, Any],
    results: list[dict],
    files: dict[int, Path],
    details: dict[str, str],
    shown: int = 24,
    run: plot.Figure | None = None,
) -> Analysis | None:
    """Write the page, which needs no other file and no network; next to it images.html and label_errors.json.

    Args:
        path: of the page.
        data: checked COCO-format annotations; without annotations, the page shows only the detections.
        results: COCO-format detections, as from `read_results`.
        files: the image file of each id; unreadable ones are not drawn.
        details: lines for the head of the page, such as the data set and the weights.
        shown: number of images to draw; 0 also leaves out images.html, which has up to 100.
        run: curves of the training, in the colours ON_PAGE.

    Returns:
        the figures; None without annotations.

    Raises:
        DataError: the page can't be written.
    """
    entries = {image["id"]: image for image in data["images"]}
    values = {"details": details, "num_images": len(entries), "lowest": _LOWEST, "words": _WORDS, "start": SCORE_THRESH}
    if not any(not a.get("iscrowd") for a in data["annotations"]):
        figures = _draw_predictions(data, results, files, shown)
        write_page(path, "predictions.html.j2", figures=figures, classes=_count_classes(data, results), **values)
        return None
    analysis = analyse(data, results)
    values |= {"analysis": analysis, "show": show, "run": run and to_svg(run)}
    _write_pages(Path(path), data, results, files, values, shown)
    return analysis


def _write_pages(
    path: Path, data: dict[str, Any], results: list[dict], files: dict[int, Path], values: dict[str, Any], shown: int
) -> None:
    """Write the report of data with annotations, the page of the set, and the likely label errors."""
    analysis, entries = values["analysis"], {image["id"]: image for image in data["images"]}
    values["tally"] = {kind: [int(n) for n in counts] for kind, counts in analysis.tally.items()}
    label_errors = find_label_errors(data, results)
    write_page(
        path,
        "report.html.j2",
        columns=COLUMNS,
        charts=draw_charts(analysis),
        figures=_draw_images(analysis, entries, files, _choose_worst(_sums_of(_count_errors(analysis)), shown)),
        drawn_set=_DRAWN_SET if shown else "",
        label_errors=draw_label_errors(data, label_errors, files, min(shown, _DOUBTS_SHOWN)),
        **_confused_classes(confusion(analysis), analysis.names),
        **values,
    )
    if shown:
        figures = _draw_images(analysis, entries, files, _choose_evenly(entries))
        write_page(path.with_name(_DRAWN_SET), "images.html.j2", figures=figures, report=path.name, **values)
    write_proposals(path.with_name("label_errors.json"), data, label_errors)


def _count_classes(data: dict[str, Any], results: list[dict]) -> list[tuple[str, list[int]]]:
    """For each class, the number of detections of at least 0.3, 0.5 and 0.7."""
    counts = {limit: Counter(r["category_id"] for r in results if r["score"] >= limit) for limit in (0.3, 0.5, 0.7)}
    pairs = zip(*classes_of(data), strict=True)
    return [(name, [counts[limit][number] for limit in counts]) for name, number in pairs]


def _draw_predictions(data: dict[str, Any], results: list[dict], files: dict[int, Path], shown: int) -> list[Figure]:
    """Images with the most detections of SCORE_THRESH or more, in the colours of their classes."""
    classes = {c["id"]: (c["name"], label) for label, c in enumerate(sorted(data["categories"], key=itemgetter("id")))}
    detections = defaultdict(list)
    for r in sorted(results, key=lambda r: -r["score"]):
        if r["score"] >= _LOWEST:
            detections[r["image_id"]].append(r)
    counts = {image: sum(r["score"] >= SCORE_THRESH for r in found) for image, found in detections.items()}
    figures = []
    for image in sorted(data["images"], key=lambda image: -counts.get(image["id"], 0)):
        if len(figures) == shown:
            break
        marks = [_mark_detection(r, *classes[r["category_id"]]) for r in detections[image["id"]][:_MOST_MARKS]]
        figures += _try_to_draw(files[image["id"]], image["file_name"], marks, "")
    return figures


def _mark_detection(r: dict, name: str, label: int) -> Mark:
    """Mark of a detection that is compared with nothing."""
    return Mark(r["bbox"], _label_of(name, r["score"]), "class", r["score"], colour=colour_of(label))


def _draw_images(
    analysis: Analysis, entries: dict[int, dict], files: dict[int, Path], chosen: Collection[int]
) -> list[Figure]:
    """Draw images with their objects and detections, most errors at the analysis' threshold first."""
    errors = _count_errors(analysis)
    sums = _sums_of({image: errors[image] for image in chosen})
    found, objects = _by_image(analysis.found, chosen), _by_image(analysis.objects, chosen)
    figures = []
    for image in sorted(chosen, key=lambda i: -errors[i].total()):
        marks = _marks_of(analysis, objects[image], found[image])
        groups = " ".join(group for group in _GROUPS if sums[image][group])
        caption = _caption(entries[image]["file_name"], errors[image], len(objects[image]))
        figures += _try_to_draw(files[image], caption, marks, groups)
    return figures


def _sums_of(errors: dict[int, Counter]) -> dict[int, dict[str, int]]:
    """Image -> number of errors of each group."""
    return {image: {g: sum(n[kind] for kind in kinds) for g, kinds in _GROUPS.items()} for image, n in errors.items()}


def _choose_evenly(entries: dict[int, dict]) -> list[int]:
    """Up to _MOST_DRAWN images, spread over the whole set."""
    return list(entries)[:: max(1, -(-len(entries) // _MOST_DRAWN))]


def _marks_of(analysis: Analysis, objects: list[Object], found: list[Found]) -> list[Mark]:
    """Marks of an image's objects, the missed ones first, and detections, both highest scores first in the list."""
    marks = [_mark_object(o, analysis) for o in objects[-_MOST_OBJECTS:]]
    return marks + [_mark_found(f, analysis) for f in found if f.score >= _LOWEST][:_MOST_MARKS]


def _choose_worst(sums: dict[int, dict[str, int]], shown: int) -> dict[int, None]:
    """Up to `shown` images: those with the most errors of each group in turn.

    Args:
        sums: number of errors of each group, by image.
    """
    chosen: dict[int, None] = {}
    ranks = [sorted(sums, key=lambda i: -sums[i][group]) for group in _GROUPS]
    for row in zip(*ranks, strict=True):
        for image, group in zip(row, _GROUPS, strict=True):
            if sums[image][group] and len(chosen) < shown:
                chosen[image] = None
    return chosen


def _count_errors(analysis: Analysis) -> dict[int, Counter]:
    """For each image with errors, their number of each kind at the analysis' threshold."""
    errors: dict[int, Counter] = defaultdict(Counter)
    for f in analysis.found:
        if f.score >= analysis.threshold and f.kind != "found":
            errors[f.image][f.kind] += 1
    for o in analysis.objects:
        if o.score < analysis.threshold:
            errors[o.image]["missed"] += 1
    return errors


def _by_image(entries: Iterable[Found | Object], chosen: Collection[int]) -> dict[int, list]:
    """The detections or objects of the chosen images, highest scores first."""
    groups = defaultdict(list)
    for entry in entries:
        if entry.image in chosen:
            groups[entry.image].append(entry)
    return defaultdict(list, {image: sorted(group, key=lambda e: -e.score) for image, group in groups.items()})


def _mark_object(o: Object, analysis: Analysis) -> Mark:
    """Mark of an object, shown while the threshold is above the score of its detection."""
    name = analysis.names[o.label]
    return Mark(o.box, name, "missed", o.score, f"{name}, missed" + (f" above {o.score:.2f}" if o.score else ""))


def _mark_found(f: Found, analysis: Analysis) -> Mark:
    """Mark of a detection, shown while its score reaches the threshold."""
    label = _label_of(analysis.names[f.label], f.score)
    return Mark(f.box, label, f.kind, f.score, f"{label}, {_WORDS[f.kind]}")


def _label_of(name: str, score: float) -> str:
    """Class and score."""
    return f"{name} {score:.2f}"


def _caption(name: str, errors: Counter, objects: int) -> str:
    """File name, numbers of errors, and how many of the objects are drawn if not all are."""
    drawn = (
        f"; {_MOST_OBJECTS:,} of {objects:,} objects drawn, the missed ones first" if objects > _MOST_OBJECTS else ""
    )
    counts = ", ".join(f"{errors[kind]} {word}" for kind, word in _WORDS.items() if errors[kind])
    return f"{name}: {counts or 'no errors'}{drawn}"


def _try_to_draw(path: Path, text: str, marks: list[Mark], groups: str) -> list[Figure]:
    """One figure, or none where the image can't be read."""
    try:
        return [draw(path, text, marks, groups)]
    except DataError:
        return []


def _confused_classes(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The confusion matrix as the page draws it, and its most frequent confusions."""
    return {"matrix": _cells_of(matrix, names), "confusions": _frequent_confusions(matrix, names)}


def _cells_of(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Confusion matrix for the page: heads, and rows of cells. Of many classes, the most confused ones."""
    wrong = matrix - np.diag(np.diag(matrix))
    mixed = wrong[:-1, :-1].sum(0) + wrong[:-1, :-1].sum(1)
    kept = sorted(np.argsort(-mixed, kind="stable")[:_MOST_CLASSES].tolist())
    indices, heads = [*kept, len(names)], [names[k] for k in kept]
    rows = []
    for i in indices:
        total = max(matrix[i].sum(), 1)
        true = names[i] if i < len(names) else "nothing"
        cells = []
        for j in indices:
            predicted = names[j] if j < len(names) else "nothing"
            hue = "var(--found)" if i == j else "var(--missed)" if j == indices[-1] else "var(--false)"
            title = f"true: {true}, detected: {predicted}, {matrix[i, j]}"
            cells.append(_Cell(int(matrix[i, j]), float(matrix[i, j] / total), hue, title))
        rows.append((true, cells))
    rows[-1][1][-1] = _Cell(0, 0.0, "transparent", "nothing, detected as nothing: not counted")
    return {"heads": heads, "rows": rows, "left_out": len(names) - len(kept)}


def _frequent_confusions(matrix: np.ndarray, names: list[str]) -> list[tuple[str, str, int]]:
    """The most frequent pairs: true class, predicted class, number."""
    mixed = matrix[:-1, :-1].copy()
    np.fill_diagonal(mixed, 0)
    order = np.argsort(-mixed, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = zip(*np.unravel_index(order, mixed.shape), strict=True)
    return [(names[i], names[j], int(mixed[i, j])) for i, j in pairs if mixed[i, j]]
