"""Tables and pictures of projects/dino/README.md, from the results that benchmarks/ablation.py wrote."""

import json
import statistics

from plots import plot_curves
from report import ROOT, replaced

from dino.utils.files import DataError, write_whole

RESULTS = ROOT / "benchmarks/results/ablation"
PAGE = ROOT / "projects/dino/README.md"
BEGIN, END = "<!-- begin: made by benchmarks/ablation.py -->", "<!-- end: made by benchmarks/ablation.py -->"
CHAIN = {
    "chain_1_static": "static queries, no denoising",
    "chain_2_denoising": "+ denoising",
    "chain_3_contrastive": "+ contrastive denoising",
    "chain_4_mixed": "+ mixed query selection",
    "chain_5_twice": "+ look forward twice (DINO)",
}
VARIANTS = {
    "select_pure": "pure query selection",
    "select_objectness": "selection by objectness",
    "select_patterns": "a third of the boxes, 3 patterns each",
    "denoise_none": "no denoising",
    "denoise_positives": "denoising without negatives",
    "denoise_shift": "negatives by shifted centres",
    "denoise_20": "20 denoising queries",
    "denoise_50": "50 denoising queries",
    "denoise_300": "300 denoising queries",
    "look_once": "look forward once",
    "position_learned": "learned position embedding",
    "aux_none": "no auxiliary losses",
    "decoder_1": "1 decoder layer",
    "decoder_6": "6 decoder layers",
    "encoder_0": "no encoder",
    "encoder_6": "6 encoder layers",
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
ANCESTORS = {
    "deformable_detr": "Deformable DETR",
    "faster_rcnn_r18_fpn": "Faster R-CNN (Detectron2)",
    "retinanet_r18_fpn": "RetinaNet (Detectron2)",
}
DATA = {"shapes": "hard shapes", "bccd": "BCCD"}
NOT_RUN = "not run"
RECALLED = "43.4 DN-DETR, 44.9 optimised, 46.5 pure selection, 47.0 mixed, 47.4 twice, 47.9 contrastive"
PUBLISHED = f"""**Two published lists**, of large models on COCO: only the order can be compared.

| source | AP |
|---|---|
| a reader's note | 43.4 -> 46.8 -> 48.2 -> 49.4 |
| the paper's table as recalled from memory; COCO, R50, 12 epochs | {RECALLED} |
"""


def load(results, data):
    """The results of a data set, by recipe and seed.

    Raises:
        DataError: a file is damaged, or two cells had different budgets or data.
    """
    found = []
    for path in sorted((results / data).glob("*.json")):
        try:
            result = json.loads(path.read_text())
            result["AP"], result["curve"], result["processor_seconds"]
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
    """Mean, sample standard deviation and number, as people write it."""
    if not results:
        return NOT_RUN
    values = [result[key] for result in results if result.get(key) is not None]
    if not values:
        return "no such objects"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})"


def as_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def gains(results, recipe, before):
    """By how much AP a recipe exceeds the one before it, seed by seed."""
    base = {result["seed"]: result["AP"] for result in of_recipe(results, before)}
    return [{"AP": r["AP"] - base[r["seed"]]} for r in of_recipe(results, recipe) if r["seed"] in base]


def gain_table(results, names, bases):
    """One row for each of `names`, with its gain over the recipe of the same place in `bases`; "" for none.

    results: data set -> its results
    """
    columns = ("AP", "gain", "AP50", "APs")
    header = ["", *(f"{DATA[data]}: {column}" for data in DATA for column in columns)]
    rows = []
    for before, (recipe, name) in zip(bases, names.items(), strict=True):
        row = [f"[{name}](configs/ablation/{recipe}.py)"]
        for data in DATA:
            found = of_recipe(results[data], recipe)
            gain = spread(gains(results[data], recipe, before)) if before else ""
            row += [spread(found), gain, spread(found, "AP50"), spread(found, "APs")]
        rows.append(row)
    return as_table(header, rows)


def single_table(results, names):
    """One row for each of `names`: AP and cost."""
    rows = []
    for recipe, name in names.items():
        found = of_recipe(results, recipe)
        cells = [spread(found, key) for key in ("AP", "AP50", "APs")]
        cost = f"{statistics.mean(r['processor_seconds'] for r in found):.0f}" if found else NOT_RUN
        rows.append([f"[{name}](configs/ablation/{recipe}.py)", *cells, cost])
    return as_table(["", "AP", "AP50", "APs", "processor seconds"], rows)


def length_of(found, unit):
    """Mean length of trainings of one recipe."""
    if unit == "processor_seconds":
        return statistics.mean(r[unit] for r in found)
    return found[0]["budget"][unit]


def points(results, recipe, unit):
    """Mean curve over the seeds: x in `unit` (of the budget, or "processor_seconds"), AP, lowest, highest."""
    found = of_recipe(results, recipe)
    if not found:
        return None
    iterations = [point["iteration"] for point in found[0]["curve"]]
    total = length_of(found, unit)
    x = [total * iteration / iterations[-1] for iteration in iterations]
    columns = list(zip(*([point["AP"] for point in r["curve"]] for r in found), strict=True))
    return x, [statistics.mean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def draw(path, panels):
    """Write an SVG picture. panels: (title, unit, results, recipe -> label)"""
    drawn = []
    for title, unit, results, names in panels:
        curves = [(label, points(results, recipe, unit)) for recipe, label in names.items()]
        drawn.append((title, (unit.replace("_", " "), "AP"), curves))
    plot_curves(path, drawn)


def budget_line(results):
    """What all cells had in common."""
    lines = []
    for data, name in DATA.items():
        if results[data]:
            budget = results[data][0]["budget"]
            commits = sorted({r["commit"][:10] + " with changes" * r["changed_since_commit"] for r in results[data]})
            processors = sorted({r["hardware"]["cpu"].replace("(R)", "") for r in results[data]})
            lines.append(
                f"{name} (annotations {results[data][0]['fingerprint']}): {budget['iterations']} iterations of "
                f"{budget['batch']} images, {budget['epochs']:g} epochs; {len(results[data])} cells, commit "
                f"{', '.join(commits)}, one thread of {' or '.join(processors)}"
            )
        else:
            lines.append(f"{name}: {NOT_RUN}")
    hours = sum(r["processor_seconds"] for cells in results.values() for r in cells) / 3600
    return ". ".join(lines) + f". All cells took {hours:.1f} processor hours."


def sections(results):
    """The text between the marks."""
    beside = {**ANCESTORS, "chain_5_twice": "DINO"}
    return [
        f"{budget_line(results)}\n",
        "Mean ± sample standard deviation (number of seeds) of the last evaluation, in percent. *Gain*: AP over the "
        "row above, seed by seed.\n",
        gain_table(results, CHAIN, ["", *CHAIN][:-1]),
        "![AP against iterations: the chain](ablation_chain.svg)\n",
        PUBLISHED,
        "**Other variants**, hard shapes; each differs from DINO in one thing:\n",
        single_table(results["shapes"], VARIANTS),
        "![AP against iterations: other variants](ablation_variants.svg)\n",
        "**Beside the ancestors**, hard shapes, the same start, norm, data and iterations:\n",
        single_table(results["shapes"], beside),
        "![AP against epochs and processor seconds](ablation_ancestors.svg)\n",
        "**With parts of descendants** ([what they are](../../docs/descendants.md)); *gain*: AP over DINO:\n",
        gain_table(results, DESCENDANTS, ["chain_5_twice"] * len(DESCENDANTS)),
    ]


def write(results_folder=RESULTS, page=PAGE):
    """Write tables and pictures.

    Raises:
        DataError: a result is damaged or of another budget, or the page has lost its marks.
    """
    results = {data: load(results_folder, data) for data in DATA}
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise DataError(f"{page} has lost the marks {BEGIN} and {END}")
    shapes = results["shapes"]
    full = {"chain_5_twice": "DINO"}
    draw(
        page.with_name("ablation_chain.svg"),
        [(name, "iterations", results[data], CHAIN) for data, name in DATA.items()],
    )
    halves = [dict(list(VARIANTS.items())[:9]), dict(list(VARIANTS.items())[9:])]
    titles = ["queries and denoising", "decoder and encoder"]
    panels = [(title, "iterations", shapes, {**full, **half}) for title, half in zip(titles, halves, strict=True)]
    draw(page.with_name("ablation_variants.svg"), panels)
    units = ("epochs", "processor_seconds")
    draw(
        page.with_name("ablation_ancestors.svg"),
        [("hard shapes", unit, shapes, {**full, **ANCESTORS}) for unit in units],
    )
    write_whole(page, lambda part: part.write_text(replaced(text, BEGIN, END, sections(results))))
