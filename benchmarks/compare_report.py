"""Table and picture of projects/dino/README.md, from the results that benchmarks/compare_detectors.py wrote."""

import itertools
import json
import math
import statistics
from collections import defaultdict

from ablation_report import as_table, spread
from compared_recipes import DETECTORS, DINO
from plots import plot_curves
from report import ROOT, write_between

from dino.utils.files import DataError, counted

RESULTS = ROOT / "benchmarks/results/comparison"
PAGE = ROOT / "projects/dino/README.md"
PICTURE = "comparison.svg"
MARKS = (
    "<!-- begin: made by benchmarks/compare_detectors.py -->",
    "<!-- end: made by benchmarks/compare_detectors.py -->",
)
WEIGHTS = {"": "last", "ema_": "averaged"}  # front of a metric's key -> whose metric
METRICS = ("AP", "AP50")
EARLIER = (0.25, 0.5)  # parts of the minutes at which the table states the metrics too
UNITS = {"processor_seconds": "processor minutes", "images": "images seen"}
OF_SETUP = ("minutes", "fingerprint", "batch", "recipe")  # what all results of a setup have in common
OF_DETECTOR = ("recipe_hash", "iterations")


def load(folder):
    """Setup -> detector -> its results, in the order of the seeds.

    Raises:
        DataError: a file is damaged, or two runs that share a row or a table differ in more than the seed.
    """
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*/*.json")):
        try:
            result = json.loads(path.read_text())
            result["curve"][-1]["ema_AP50"], result["training_seconds"]
            setup, rows = path.parent.name, found[path.parent.name]
            check_same(path, result, OF_SETUP, next(iter(rows.values()), [result])[0])
            check_same(path, result, OF_DETECTOR, (rows[result["detector"]] or [result])[0])
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path} is no result of a run ({error!r}): remove it, and run it again") from error
        found[setup][result["detector"]].append(result)
    return found


def check_same(path, result, keys, other):
    """Raise a DataError where two results differ in one of `keys`."""
    for key in keys:
        if result[key] != other[key]:
            raise DataError(
                f"{path}: {key} {result[key]}, but {other['detector']}_{other['seed']} has {other[key]}: such runs "
                "can't share a table; remove one of them, or use another --results"
            )


def value_at(curve, seconds, key):
    """A metric after so many processor seconds, between the two evaluations around; None outside the curve."""
    for before, after in itertools.pairwise(curve):
        if before["processor_seconds"] <= seconds <= after["processor_seconds"]:
            length = after["processor_seconds"] - before["processor_seconds"]
            part = (seconds - before["processor_seconds"]) / length
            return before[key] + part * (after[key] - before[key])
    return None


def spread_at(results, seconds, key):
    """Mean and spread of a metric after so many processor seconds."""
    values = [value_at(result["curve"], seconds, key) for result in results]
    known = [{key: value} for value in values if value is not None]
    return spread(known, key) if known else "no evaluation yet"


def metric_cells(results, front):
    """Metrics of one kind of weights: earlier, at the end, and of the test split."""
    keys = [f"{front}{key}" for key in METRICS]
    times = [part * 60 * results[0]["minutes"] for part in EARLIER]
    ends = [result["curve"][-1] for result in results]
    tests = [result["test"] for result in results if "test" in result]
    earlier = [spread_at(results, seconds, key) for seconds in times for key in keys]
    return [*earlier, *(spread(source, key) for source in (ends, tests) for key in keys)]


def setup_table(rows):
    """One row for each detector and kind of weights."""
    minutes = next(iter(rows.values()))[0]["minutes"]
    times = [f"{part * minutes:g} min" for part in EARLIER] + ["end", "test"]
    header = ["", "weights", *(f"{time}: {key}" for time in times for key in METRICS)]
    header += ["minutes", "iterations", "epochs"]
    lines = []
    for detector, results in in_order(rows):
        first = results[0]
        spent = statistics.mean(result["training_seconds"] for result in results) / 60
        epochs = first["iterations"] * first["batch"] / first["training_images"]
        cost = [f"{spent:.1f}", str(first["iterations"]), f"{epochs:.1f}"]
        for front, name in WEIGHTS.items():
            lines.append([DETECTORS[detector], name, *metric_cells(results, front), *cost])
    return as_table(header, lines)


def in_order(rows):
    """(detector, results), in the order of DETECTORS."""
    return [(detector, rows[detector]) for detector in DETECTORS if rows.get(detector)]


def difference(ours, theirs, key):
    """Difference of two means and its standard error, as people write it."""
    values = [[result["curve"][-1][key] for result in results] for results in (ours, theirs)]
    means = [statistics.mean(column) for column in values]
    if min(map(len, values)) < 2:
        return f"{means[0] - means[1]:+.1f} (a detector has one seed: no standard error)"
    error = math.sqrt(sum(statistics.variance(column) / len(column) for column in values))
    return f"{means[0] - means[1]:+.1f} ± {error:.1f}"


def differences(rows):
    """By how much DINO is ahead of each other detector at the end, with averaged weights, on the validation split."""
    found = [
        f"{DETECTORS[detector]}: AP {difference(rows[DINO], results, 'ema_AP')}, "
        f"AP50 {difference(rows[DINO], results, 'ema_AP50')}"
        for detector, results in in_order(rows)
        if detector != DINO and rows.get(DINO)
    ]
    return f"DINO minus {'; '.join(found)} (averaged weights, at the end, with standard error)\n" if found else ""


def stated_settings(rows):
    """The overrides of each detector, in words; those of all detectors come first."""
    settings = {DETECTORS[name]: results[0]["settings"] for name, results in in_order(rows)}
    shared = set.intersection(*map(set, settings.values()))
    first = next(iter(settings.values()))
    stated = {"all": in_both(first, shared), **{name: in_both(w, set(w) - shared) for name, w in settings.items()}}
    return "; ".join(f"{name}: `{words}`" for name, words in stated.items() if words) or "none"


def in_both(words, wanted):
    """The wanted words in their order, as one string."""
    return " ".join(word for word in words if word in wanted)


def origin(rows):
    """What the runs of a setup had in common, and where they ran."""
    results = [result for found in rows.values() for result in found]
    first = results[0]
    commits = sorted({r["commit"][:10] + " with changes" * r["changed_since_commit"] for r in results})
    processors = sorted({r["hardware"]["cpu"].replace("(R)", "") for r in results})
    load, minutes = max(r["load_at_start"][0] for r in results), sum(r["evaluation_seconds"] for r in results) / 60
    return (
        f"Recipe {first['recipe']}; "
        f"{first['training_images']} images for training (annotations {first['fingerprint']}), batch {first['batch']}; "
        f"commit {', '.join(commits)}, one thread of {' or '.join(processors)}, "
        f"load of the machine at most {load:.1f} at the starts. "
        f"Settings: {stated_settings(rows)}. Evaluations took {counted(round(minutes), 'minute')} more.\n"
    )


def mean_curve(results, unit, key):
    """x, mean, lowest and highest of the seeds; the n-th evaluations belong together."""
    if not results:
        return None
    factor = 60 if unit == "processor_seconds" else 1
    points = list(zip(*(result["curve"] for result in results), strict=True))
    x, values = ([[point[k] for point in column] for column in points] for k in (unit, key))
    return (
        [statistics.mean(column) / factor for column in x],
        *(list(map(function, values)) for function in (statistics.mean, min, max)),
    )


def panels_of(setup, rows):
    """Four panels of the picture: AP and AP50 of averaged weights, against minutes and against images."""
    data = setup.removesuffix(f"-{next(iter(rows.values()))[0]['recipe']}")
    return [
        (
            data,
            (label, f"{key} (averaged weights)"),
            [(name, mean_curve(rows.get(detector), unit, f"ema_{key}")) for detector, name in DETECTORS.items()],
        )
        for unit, label in UNITS.items()
        for key in METRICS
    ]


def sections(found):
    """The text between the marks."""
    if not found:
        return ["Not run yet.\n"]
    text = [
        "Mean ± sample standard deviation (number of seeds), in percent, on the validation images; *test*: the last "
        "weights, evaluated once. Minutes are processor minutes of the training without its evaluations.\n",
        f"![AP and AP50 against processor minutes and images]({PICTURE})\n",
    ]
    for setup, rows in found.items():
        text += [f"**{setup}.** {origin(rows)}", setup_table(rows), differences(rows)]
    return text


def page_of(results_folder):
    """The page of a folder of results: of other folders than RESULTS, one inside it."""
    return PAGE if results_folder.resolve() == RESULTS.resolve() else results_folder / "comparison.md"


def write(results_folder, page):
    """Write table and picture.

    Raises:
        DataError: a result is damaged, two results can't share a table, or the page has lost its marks.
    """
    found = load(results_folder)
    if found:
        panels = [panel for setup, rows in found.items() for panel in panels_of(setup, rows)]
        plot_curves(page.with_name(PICTURE), panels, columns=2)
    write_between(page, MARKS, sections(found))
