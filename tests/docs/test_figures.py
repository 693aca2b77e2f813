"""Figures of the pages are those of their sources: result files of this project, and the tables of the paper."""

import json
import re
import statistics

import pytest

from tests.tools.programs import ROOT, load_program

RESULTS = ROOT / "benchmarks/results"
PROJECT = (ROOT / "projects/dino/README.md").read_text()
QUICK_START = (ROOT / "docs/quick_start.md").read_text()
# The paper (arXiv 2203.03605v4), tables 1 and 2: scales, epochs -> AP, AP50, AP75, AP of small, medium, large objects
DINO = {
    (4, 12): "49.0 66.6 53.5 32.0 52.3 63.0",
    (5, 12): "49.4 66.9 53.8 32.3 52.5 63.9",
    (4, 24): "50.4 68.3 54.8 33.3 53.7 64.8",
    (5, 24): "51.3 69.1 56.0 34.5 54.2 65.8",
    (4, 36): "50.9 69.0 55.3 34.6 54.1 64.6",
    (5, 36): "51.2 69.0 55.8 35.0 54.3 65.3",
}
TABLE_4 = "44.9 46.5 47.0 47.4 47.9"
TABLE_6 = {"6/6": 47.4, "4/6": 46.2, "3/6": 45.8, "2/6": 45.4, "6/4": 46.0, "6/2": 44.4, "2/4": 44.1, "2/2": 41.2}
TABLE_7 = {"pairs": 47.9, "1000": 47.6, "200": 47.4, "100": 47.4, "50": 46.7, "10": 46.0, "none": 45.1}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(page, start):
    """The cells of the lines that begin so."""
    return [cells(line) for line in page.splitlines() if line.startswith(start)]


@pytest.mark.parametrize(("scales", "epochs"), DINO)
def test_the_papers_first_table(scales, epochs):
    name, figures = f"dino_r50_{scales}scale_{epochs}ep", DINO[scales, epochs].split()
    (row,) = rows(PROJECT, f"| DINO: [{name}](")
    assert row[1:3] == [str(scales), str(epochs)]
    assert row[3:9] == figures
    assert f"Published for this setting: {figures[0]} AP" in (ROOT / f"configs/{name}.py").read_text()
    (row,) = rows(PROJECT, f"| [{name}](")
    assert row[1] == figures[0]


@pytest.mark.parametrize(("number", "table"), [(6, TABLE_6), (7, TABLE_7)])
def test_the_papers_ablations(number, table):
    """In the sentence below our own table: a number of layers or queries, then the AP."""
    (line,) = [line for line in PROJECT.splitlines() if line.startswith(f"*The paper*, table {number}:")]
    line = line.replace("pairs of positive and negative", "pairs")
    found = re.findall(r"([\w/]+) (4\d\.\d)", line)
    assert {name: float(figure) for name, figure in found} == table


def test_the_papers_chain():
    assert [row[-1] for row in rows(PROJECT, "| [+ ")] == TABLE_4.split()[1:]
    assert ", ".join(TABLE_4.split()) + " AP" in (ROOT / "docs/method.md").read_text()


def spread(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


@pytest.mark.parametrize("data", ["bccd", "raccoon", "shapes"])
def test_the_table_of_the_quick_start(data):
    """Averaged weights, three seeds: mean and sample standard deviation."""
    start = {"bccd": "| BCCD, ", "raccoon": "| raccoons, ", "shapes": "| hard shapes, "}[data]
    lines = QUICK_START.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith(start)]
    for detector, line in zip(("dino", "faster_rcnn"), lines[place : place + 2], strict=True):
        files = sorted(RESULTS.glob(f"comparison/{data}-*/{detector}_*.json"))
        results = [json.loads(path.read_text()) for path in files]
        expected = [spread([r["curve"][-1][f"ema_{key}"] for r in results]) for key in ("AP", "AP50")]
        if data != "shapes":
            expected += [spread([r["test"][f"ema_{key}"] for r in results]) for key in ("AP", "AP50")]
        row = cells(line.replace("**", ""))
        assert row[2] == str(len(results))
        assert [cell for cell in row[3:] if cell] == expected
    if data == "raccoon":
        (dino,) = rows(QUICK_START.replace("**", ""), start)
        assert f"{dino[5]} AP and {dino[6]} AP50 on the test split" in " ".join(
            (ROOT / "README.md").read_text().split()
        )


def test_the_table_of_exported_files():
    """Between its marks the page has the section of each file of results, and nothing else."""
    program = load_program("export_cpu", "benchmarks")
    (made,) = re.findall(f"{program.BEGIN}(.*?){program.END}", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("export_cpu_*.json"))]
    assert made.strip() == "\n\n".join(map(program.section, results))


def test_the_times_of_the_loader():
    steps = json.loads((RESULTS / "loader_2workers.json").read_text())["steps"]
    text = " ".join((ROOT / "docs/scaling.md").read_text().split())
    decode, augment, tensor, boxes, pad = (f"{1000 * steps[key]:.1f} ms" for key in steps)
    total = 1000 * (sum(steps.values()) - steps["pad to a batch"])
    assert f"takes {total:.1f} ms per image" in text
    assert f"a core loads {1000 / total:.0f} images a second" in text
    assert f"{decode} decoding" in text
    assert f"{augment} flip, crop and resizing" in text
    assert f"{tensor} tensor, {boxes} boxes" in text
    assert f"costs the training process {pad}" in text


MADE = {
    "docs/performance.md": [
        *(("deform_attn_*.json", "section"), ("model_*.json", "model_section"), ("growth_*.json", "growth_section"))
    ],
    "docs/performance_cuda.md": [("cuda*/", "gpu_page")],
}
NOT_SHOWN = {"model_cpu_1threads_earlier.json"}  # compares this project with an earlier commit of its own


@pytest.mark.parametrize("page", MADE)
def test_measured_parts_are_made_from_the_present_results(page):
    report, text = load_program("report", "benchmarks"), (ROOT / page).read_text()
    for pattern, function in MADE[page]:
        paths = [path for path in sorted(RESULTS.glob(pattern)) if path.name not in NOT_SHOWN]
        assert paths
        for path in paths:
            assert getattr(report, function)(path).strip() in text, path.name


@pytest.mark.parametrize("name", ["ablation", "compare_detectors"])
def test_tables_of_trainings_are_made_from_the_present_results(name):
    program = load_program(name, "benchmarks")
    if name == "ablation":
        report = program.ablation_report
        results = {data: found for data in report.DATA if (found := report.load(RESULTS / name, data))}
        sections = report.sections(results, report.PAGE)
    else:
        report = program.compare_report
        sections = report.sections(report.load(RESULTS / "comparison"))
    assert len(sections) > 3
    assert not [section for section in sections if section.strip() not in PROJECT]
