"""What `dino eval` does with detections: report.html, metrics.json and a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import figure as plot

from dino.data.coco import read_images
from dino.utils.files import UserError, make_folder, write_whole
from dino.utils.printable import printable
from dino.utils.run_folder import hold_folder, new_folder

from .error_analysis import COLUMNS, ERROR_WORDS, Analysis, show
from .report import image_paths, write_report
from .results import read_results

_MOST_COLUMNS = 40  # of a class name in the table


RESULTS = "coco_instances_results.json"  # as Detectron2's evaluator calls the file of detections


class Detected(NamedTuple):
    """Detections of a data set.

    Args:
        data: annotations, parsed from COCO format.
        files: of each image id.
        results: file of the detections in COCO's results format.
        details: what was evaluated, for the head of the report.
    """

    data: dict[str, Any]
    files: dict[int, Path]
    results: Path
    details: dict[str, str]


def choose_weights(folder: Path, details: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """Which detections an evaluation reports: those of the weights with which `dino predict` detects.

    Args:
        folder: holds the detections as Detectron2's evaluator writes them, those of averaged weights in `averaged`.
        details: of the report.

    Returns:
        the file, and the details, which name averaged weights.
    """
    averaged = folder / "inference/averaged" / RESULTS
    if averaged.is_file():
        return averaged, {**details, "Copy": "averaged weights, as dino predict uses them"}
    return folder / "inference" / RESULTS, details


def read_detections(results: Path, annotations: str, images: str) -> Detected:
    """Detections of any program, for data in COCO format.

    Raises:
        DataError: the annotations are missing or broken.
    """
    data = read_images(annotations, images)
    details = {"Data": annotations, "Detections": str(results)}
    return Detected(data, image_paths(data, images), results, details)


@contextmanager
def claim_report(wanted: Path | None) -> Iterator[Path]:
    """Hold the folder of the report within the block; None: a new one, output/evaluation, output/evaluation.1, …

    Raises:
        UserError: it holds a report already, or another process writes one.
    """
    with nullcontext(str(wanted)) if wanted else new_folder(Path("output/evaluation")) as name:
        folder = Path(name)
        with hold_folder(folder):
            if (folder / "report.html").exists():
                raise UserError(f"{folder / 'report.html'} exists: choose another --output")
            yield folder


def write_evaluation(
    folder: Path, detected: Detected, shown: int = 24, run: plot.Figure | None = None
) -> dict[str, Any]:
    """Write the report and, for data with annotations, the metrics; print a table of them.

    Args:
        shown: number of images to draw.
        run: curves of the training, see `write_report`.

    Returns:
        the content of metrics.json: AP in [0, 1], -1 where undefined; nothing for data without annotations.

    Raises:
        DataError: the detections are broken or don't belong to the data.
        UserError: the folder can't be written.
    """
    data, files, results, details = detected
    found = read_results(results, data)
    make_folder(folder)
    page = folder / "report.html"
    shown_in = f"{len({entry['image_id'] for entry in found}):,} of {len(data['images']):,} images"
    print(f"comparing {len(found):,} detections in {shown_in}", flush=True)
    analysis = write_report(page, data=data, results=found, files=files, details=details, shown=shown, run=run)
    metrics = {}
    if analysis:
        metrics = _write_metrics(folder / "metrics.json", analysis)
        print(_table(analysis))
    else:
        print(f"{details['Data']} has no annotations: the page shows {len(found)} predictions, no AP")
    print(f"report written to {page}")
    return metrics


def _table(analysis: Analysis) -> str:
    """AP of all classes, a row for each class, a row for each kind of error."""
    lines = ["  ".join(f"{name} {show(name, value)}" for name, value in analysis.ap.items())]
    longest = max(len(row.name) if row.name.isascii() else 2 * len(row.name) for row in analysis.rows)
    width = min(max(len("class"), longest), _MOST_COLUMNS)
    lines.append(f"{'class':<{width}}  objects" + "".join(f"{heading:>11}" for heading in COLUMNS))
    for row in analysis.rows:
        figures = "".join(f"{show(heading, figure(row)):>11}" for heading, figure in COLUMNS.items())
        lines.append(f"{printable(row.name, _MOST_COLUMNS, columns=width)}{row.objects:9}{figures}")
    return "\n".join([*lines, "", *_cost_lines(analysis)])


def _cost_lines(analysis: Analysis) -> list[str]:
    """What each kind of error costs, recall and calibration."""
    heads = ["error", f"score >= {analysis.threshold:.2f}", "AP50 without", "gain"]
    rows = [
        [ERROR_WORDS[cost.kind], f"{cost.detections}", show("AP50", cost.ap50), f"{100 * cost.gain:+.1f}"]
        for cost in analysis.costs
    ]
    lines = [f"{name:<12}{count:>16}{ap50:>15}{gain:>8}" for name, count, ap50, gain in [heads, *rows]]
    return [
        *lines,
        f"recall {show('Recall', analysis.recall)} (objects found at any score)  "
        f"calibration error {show('AP', analysis.calibration_error)}",
    ]


def _write_metrics(path: Path, analysis: Analysis) -> dict[str, Any]:
    """Write the figures of the tables as JSON: AP in [0, 1], -1 where undefined -> the content."""
    content = {
        **analysis.ap,
        "threshold": analysis.threshold,
        "recall": analysis.recall,
        "calibration_error": analysis.calibration_error,
        "classes": [row._asdict() for row in analysis.rows],
        "error_costs": [cost._asdict() for cost in analysis.costs],
    }
    text = json.dumps(content, indent=1)
    write_whole(path, lambda part: part.write_text(f"{text}\n", encoding="utf-8"))
    return json.loads(text)
