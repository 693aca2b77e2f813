"""Tables and pictures of projects/dino/README.md, from the results that benchmarks/ablation.py wrote."""

import json
import math
import os
import statistics

from plots import plot_curves
from report import ROOT, write_between

from dino.utils.files import DataError, counted

RESULTS = ROOT / "benchmarks/results/ablation"
PAGE = ROOT / "projects/dino/README.md"
PICTURE = "ablation.svg"
MARKS = ("<!-- begin: made by benchmarks/ablation.py -->", "<!-- end: made by benchmarks/ablation.py -->")
WHOLE = "chain_5_contrastive"
CHAIN = {
    "chain_1_denoising": "learned queries, denoising of positives",
    "chain_2_pure": "+ pure query selection",
    "chain_3_mixed": "+ mixed query selection",
    "chain_4_twice": "+ look forward twice",
    WHOLE: "+ contrastive denoising (DINO)",
}
PAPER = {
    "chain_1_denoising": 44.9,
    "chain_2_pure": 46.5,
    "chain_3_mixed": 47.0,
    "chain_4_twice": 47.4,
    WHOLE: 47.9,
}
LAYERS = {
    "encoder_0": "no encoder",
    "encoder_6": "6 encoder layers",
    "decoder_1": "1 decoder layer",
    "decoder_6": "6 decoder layers",
}
DENOISING = {
    "denoise_none": "no denoising",
    "chain_4_twice": "100 positives, no negatives",
    "denoise_20": "20 denoising pairs",
    "denoise_50": "50 denoising pairs",
    "denoise_300": "300 denoising pairs",
    "denoise_shift": "negatives by shifted centres",
}
OTHERS = {
    "select_pure": "pure query selection",
    "select_objectness": "selection by objectness",
    "select_patterns": "a third of the boxes, 3 patterns each",
    "look_once": "look forward once",
    "position_learned": "learned position embedding",
    "aux_none": "no auxiliary losses",
    "deformable_detr": "two-stage Deformable DETR",
}
DESCENDANTS = {
    "varifocal": "varifocal loss",
    "matchability": "DEIM's loss",
    "align_detr": "Align-DETR",
    "stable_dino": "Stable-DINO",
    "hybrid": "H-DETR's hybrid branch",
    "dac": "DAC-DETR",
    "relation_detr": "Relation-DETR",
}
TABLES = {"Layers": LAYERS, "Denoising": DENOISING, "Other variants": OTHERS, "Parts of descendants": DESCENDANTS}
DINO = {"Layers": "DINO: 3 + 3 layers", "Denoising": "DINO: 100 pairs"}  # its name in a table
PUBLISHED = (  # below the chain
    "*The paper*: table 4, ResNet-50 on COCO, 12 epochs, first version of the recipe (the later one has 49.0); its "
    'first row is "optimised DN-DETR", 43.4 before.\n'
)
OTHER_NUMBERS = {  # the paper's figures below tables that vary other numbers than it does
    "Layers": (
        "*The paper*, table 6: layers of encoder/decoder, all with 100 denoising queries and no negatives, ResNet-50 "
        "on COCO, 12 epochs: 6/6 47.4, 4/6 46.2, 3/6 45.8, 2/6 45.4, 6/4 46.0, 6/2 44.4, 2/4 44.1, 2/2 41.2 AP.\n"
    ),
    "Denoising": (
        "*The paper*, table 7: denoising queries with 6 + 6 layers, ResNet-50 on COCO, 12 epochs: 100 pairs of "
        "positive and negative 47.9; positives alone: 1000 47.6, 200 47.4, 100 47.4, 50 46.7, 10 46.0; none 45.1 AP.\n"
    ),
}
DATA = {"shapes": "hard shapes", "bccd": "BCCD"}
ATD = "ATD100"  # in a result: the paper's ATD(100), see `dino.evaluation.anchor_distance`
COLUMNS = {"AP": "AP", "AP50": "AP50", "last_AP": "AP of last weights", ATD: "ATD(100)"}
NOT_RUN = "not run"


def load(results, data):
    """The results of a data set, by recipe and seed.

    Raises:
        DataError: a file is damaged, or two cells had different budgets or data.
    """
    found = []
    for path in sorted((results / data).glob("*.json")):
        try:
            result = json.loads(path.read_text())
            result["AP"], result["last_AP"], result["curve"], result["processor_seconds"]
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} is no result of a cell ({error!r}): remove it, and run the cell again") from error
        found.append(result)
        for key in ("budget", "fingerprint"):
            if result[key] != found[0][key]:
                other = f"{found[0]['recipe']}_{found[0]['seed']} has {found[0][key]}"
                raise DataError(
                    f"{path}: {key} {result[key]}, but {other}: such cells can't share a table; "
                    "remove one of them, or use another --results"
                )
    return found


def of_recipe(results, recipe):
    return [result for result in results if result["recipe"] == recipe]


def spread(results, key="AP"):
    """Mean, sample standard deviation and number, as people write it; "" where ATD was not measured."""
    if not results:
        return NOT_RUN
    values = [result[key] for result in results if result.get(key) is not None]
    if not values:
        return "" if key == ATD else "no such objects"
    digits = 3 if key == ATD else 1
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation} ({len(values)})"


def as_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def gains(results, recipe, before):
    """By how much AP a recipe exceeds another, seed by seed."""
    base = {result["seed"]: result["AP"] for result in of_recipe(results, before)}
    return [r["AP"] - base[r["seed"]] for r in of_recipe(results, recipe) if r["seed"] in base]


def gain_cell(values):
    """Mean, standard error and number of gains, as people write it."""
    if not values:
        return "no common seed"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{error} ({len(values)})"


def with_runs(results, recipes):
    """The data sets on which at least one of the recipes has run, with their results."""
    return {data: found for data, found in results.items() if any(of_recipe(found, name) for name in recipes)}


def columns_of(found, recipes):
    """Metric -> its name, for one data set; without ATD where none of the recipes has it."""
    measured = any(ATD in result for recipe in recipes for result in of_recipe(found, recipe))
    return {key: name for key, name in COLUMNS.items() if key != ATD or measured}


def cells_of(found, recipe, before, columns):
    """Cells of a recipe for one data set: metrics, and the gain over the recipe `before`; "" for none."""
    mine = of_recipe(found, recipe)
    gain = gain_cell(gains(found, recipe, before)) if before and mine else ""
    return [*(spread(mine, key) for key in columns), gain]


def link_to(recipe, name, page):
    """A name with a link to its recipe."""
    return f"[{name}]({os.path.relpath(ROOT / 'projects/dino/configs/ablation', page.parent)}/{recipe}.py)"


def gain_table(results, names, bases, page, published=None):
    """One row for each of `names` that has run.

    Args:
        results: data set -> its results.
        names: recipe -> its name.
        bases: for each of `names`, the recipe over which it gains; "" for none.
        page: the file that the table is for.
        published: recipe -> published AP; None leaves the column out.
    """
    columns = {data: columns_of(found, names) for data, found in results.items()}
    header = ["", *(f"{DATA[data]}: {column}" for data in results for column in (*columns[data].values(), "gain"))]
    header += ["the paper"] if published else []
    rows = []
    for before, (recipe, name) in zip(bases, names.items(), strict=True):
        if with_runs(results, [recipe]):
            cells = [cell for d, found in results.items() for cell in cells_of(found, recipe, before, columns[d])]
            last = [f"{published[recipe]:.1f}"] if published else []
            rows.append([link_to(recipe, name, page), *cells, *last])
    return as_table(header, rows)


def chain_sections(results, page):
    """Table and picture of the chain; nothing if it has not run."""
    if not (known := with_runs(results, CHAIN)):
        return []
    table = gain_table(known, CHAIN, ["", *CHAIN][:-1], page, PAPER)
    return [table, PUBLISHED, f"![AP against iterations: the chain]({PICTURE})\n"]


def variant_sections(results, title, names, page):
    """Title, table of variants with DINO as last row, and the paper's figures; nothing if none has run."""
    if not (known := with_runs(results, names)):
        return []
    bases = [*([WHOLE] * len(names)), ""]
    table = gain_table(known, {**names, WHOLE: DINO.get(title, "DINO")}, bases, page)
    return [f"**{title}**; *gain*: over DINO\n", table, *([OTHER_NUMBERS[title]] if title in OTHER_NUMBERS else [])]


def tables_of(results):
    """Title -> recipe -> name. Recipes that no table names are under "Other variants"."""
    named = {recipe for names in (CHAIN, *TABLES.values()) for recipe in names}
    rest = {result["recipe"] for found in results.values() for result in found} - named
    return {**TABLES, "Other variants": {**OTHERS, **{recipe: recipe for recipe in sorted(rest)}}}


def points(results, recipe):
    """Mean curve over the seeds: iterations, AP of averaged weights, lowest, highest."""
    found = of_recipe(results, recipe)
    if not found:
        return None
    columns = list(zip(*([point["AP"] for point in r["curve"]] for r in found), strict=True))
    iterations = [point["iteration"] for point in found[0]["curve"]]
    return iterations, [statistics.mean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def draw(path, results):
    """Write an SVG picture of the chain, a panel for each data set."""
    panels = [
        (
            DATA[data],
            ("iterations", "AP (averaged weights)"),
            [(label, points(found, recipe)) for recipe, label in CHAIN.items()],
        )
        for data, found in with_runs(results, CHAIN).items()
    ]
    plot_curves(path, panels)


def budget_line(results):
    """What all cells had in common."""
    lines = []
    for data, found in results.items():
        budget = found[0]["budget"]
        commits = sorted({r["commit"][:10] + " with changes" * r["changed_since_commit"] for r in found})
        processors = sorted({r["hardware"]["cpu"].replace("(R)", "") for r in found})
        lines.append(
            f"{DATA[data]} (annotations {found[0]['fingerprint']}): {budget['iterations']} iterations of "
            f"{budget['batch']} images, {budget['epochs']:g} epochs; {counted(len(found), 'training')}, commit "
            f"{', '.join(commits)}, one thread of {' or '.join(processors)}"
        )
    hours = sum(r["processor_seconds"] for found in results.values() for r in found) / 3600
    return ". ".join(lines) + f". All took {hours:.1f} processor hours.\n"


def sections(results, page):
    """The text between the marks."""
    if not results:
        return ["Not run yet.\n"]
    variants = [variant_sections(results, title, names, page) for title, names in tables_of(results).items()]
    return [
        budget_line(results),
        "Mean ± sample standard deviation (number of seeds) of the last evaluation, in percent; averaged weights "
        "unless stated. *Gain*: AP over the link before, seed by seed, ± its standard error (number of seeds). "
        "*ATD(100)*: the mean of the 100 largest L1 distances between an evaluation object and the initial anchor of "
        "the query that is matched to it, boxes as fractions of the image (the paper's section 3.3); lower is better, "
        "empty where not measured. Recipes that have not run are left out.\n",
        *chain_sections(results, page),
        *(section for found in variants for section in found),
    ]


def page_of(results_folder):
    """The page of a folder of results: of other folders than RESULTS, one inside it."""
    return PAGE if results_folder.resolve() == RESULTS.resolve() else results_folder / "ablation.md"


def write(results_folder, page):
    """Write tables and picture.

    Raises:
        DataError: a result is damaged or of another budget, or the page has lost its marks.
    """
    results = {data: found for data in DATA if (found := load(results_folder, data))}
    if with_runs(results, CHAIN):
        draw(page.with_name(PICTURE), results)
    write_between(page, MARKS, sections(results, page))
