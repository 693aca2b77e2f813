"""Tables and plots of docs/performance.md and docs/performance_cuda.md, from what the other programs here wrote.

python benchmarks/report.py           write both pages anew, from benchmarks/results
python benchmarks/report.py RESULTS   print what a folder of `tools/gpu_suite.sh` holds
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import report_cuda  # noqa: E402
from plots import plot_growth, plot_ratios  # noqa: E402

from dino.utils.files import DataError, make_folder, write_whole  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/performance.md"
PAGE_CUDA = ROOT / "docs/performance_cuda.md"
BEGIN, END = "<!-- begin: made by benchmarks/report.py -->", "<!-- end -->"
BEGIN_MODEL, END_MODEL = "<!-- begin: the model, made by benchmarks/report.py -->", "<!-- end of the model -->"
BEGIN_CUDA, END_CUDA = "<!-- begin: measured, made by benchmarks/report.py -->", "<!-- end of what was measured -->"
BEGIN_GROWTH, END_GROWTH = "<!-- begin: growth, made by benchmarks/report.py -->", "<!-- end of growth -->"
HEADER = ["case", "pass", "contender", "time", "ratio", "processor time", "its ratio", "memory", "error"]


def cells(row, reference):
    """One line of a table. Ratios say how many times faster than the reference of the same run."""
    memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f} MiB"
    errors = row.get("errors") or {}
    return [
        f"{row['name']}, batch {row['batch']}, {row['dtype']}",
        row["pass"],
        row["contender"],
        milliseconds(row["seconds"]),
        f"{reference['seconds'] / row['seconds']:.1f}",
        milliseconds(row["cpu_seconds"]),
        f"{reference['cpu_seconds'] / row['cpu_seconds']:.1f}",
        memory,
        ", ".join(f"{name} {error:.1g}" for name, error in errors.items()),
    ]


def milliseconds(seconds):
    return f"{1e3 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f} ms"


def references(rows):
    """(case, pass) -> row of the reference"""
    return {key(row): row for row in rows if row["contender"] == "reference"}


def key(row):
    return row["name"], row["batch"], row["dtype"], row["pass"]


def table(report):
    found = references(report["rows"])
    lines = [HEADER, ["---"] * len(HEADER), *(cells(row, found[key(row)]) for row in report["rows"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars(rows):
    """(case, contender, how many times faster than the reference) of each row but the references"""
    found = references(rows)
    return [
        (f"{row['name']}, batch {row['batch']}, {row['dtype']}, {row['pass']}", row["contender"], ratio)
        for row in rows
        if row["contender"] != "reference" and (ratio := found[key(row)]["seconds"] / row["seconds"])
    ]


def section(path):
    """What the page says about one file of results."""
    report = json.loads(path.read_text())
    hardware, build = report["hardware"], report["build"] or {}
    device = f"{hardware['cpu']}, {report['kernels']} kernels"
    commit = report["commit"][:10] + (" with changes" if report["changed_since_commit"] else "")
    load = report["load_before"][0]
    picture = PAGE.parent / f"{path.stem}.svg"
    plot_ratios(picture, bars(report["rows"]))
    return (
        f"### {device}, {hardware['threads']} of {hardware['cores']} threads\n\n"
        f"{report['date']}, torch {report['versions']['torch']}, {build.get('compiler', 'unknown compiler')}, commit "
        f"{commit}, medians of {report['rounds']} rounds; load of the machine before: {load:.1f}.\n\n"
        f"![ratios]({picture.name})\n\n{table(report)}\n"
    )


MODEL_HEADER = ["case", "program", "time", "ratio", "processor time", "its ratio", "peak memory", "difference"]


def model_section(path):
    """What the page says about one file of results of the whole model; ratios are to the slowest program's row."""
    report = json.loads(path.read_text())
    hardware = report["hardware"]
    commit = report["commit"][:10] + (" with changes" if report["changed_since_commit"] else "")
    instructions = ", ".join(hardware.get("bfloat16", []))  # missing in older files
    device = hardware.get("gpu", hardware["cpu"] + (f" ({instructions})" if instructions else ""))
    rate = ", ".join(f"{dtype} {speed / 1e9:.0f} G" for dtype, speed in report["matrix_product"].items())
    program = report["rows"][-1]["contender"]
    against = f"{program} at {report['against'][:10]}" if report["against"] else "no other program was at hand"
    lines = [MODEL_HEADER, ["---"] * len(MODEL_HEADER)]
    for row in report["rows"]:
        same = [r for r in report["rows"] if case_of(r) == case_of(row)]
        lines.append(model_cells(row, same[-1]))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"### R50, 4 scales: {device}, {hardware['threads']} of {hardware['cores']} threads\n\n"
        f"{report['date']}, torch {report['versions']['torch']}, commit {commit}, "
        f"{against}; medians of {report['rounds']} rounds; load of the machine before: {report['load_before'][0]:.1f}. "
        f"Multiply-adds per second of a plain matrix product: "
        f"{rate}.\n\n{table}\n"
    )


def case_of(row):
    return tuple(row[name] for name in ("work", "height", "width", "batch", "boxes", "dtype"))


def model_cells(row, other):
    work, height, width, batch, boxes, dtype = case_of(row)
    found = row["difference"] or {}
    return [
        f"{work} {height}x{width}, batch {batch}, {boxes} boxes, {dtype}",
        row["contender"],
        milliseconds(row["seconds"]),
        f"{other['seconds'] / row['seconds']:.2f}",
        milliseconds(row["cpu_seconds"]),
        f"{other['cpu_seconds'] / row['cpu_seconds']:.2f}",
        f"{row['peak_bytes'] / 2**20:.0f} MiB",
        ", ".join(f"{name} {value:.3g}" for name, value in found.items()),
    ]


GROWTH_HEADER = ["curve", "work", "from, to", "time", "multiply-adds", "memory", "its count", "why"]
REASONS = {
    "image size": "everything but the decoder works on cells, whose number grows with the area",
    "queries": "self-attention grows with their square, the rest of the decoder with their number; the cells stay",
    "boxes per image": "the slots of denoising are bounded by its budget: 200, however many boxes there are; "
    "beyond 100 the matcher's assignment shows, which grows faster than their number",
    "batch": "each image is work of its own",
    "levels": "the fifth level is a finer one: it has three times the cells of the other four together",
}


def growth_section(path):
    """What the page says about one file of curves."""
    report = json.loads(path.read_text())
    hardware = report["hardware"]
    device = hardware.get("gpu", hardware["cpu"])
    commit = report["commit"][:10] + (" with changes" if report["changed_since_commit"] else "")
    picture = PAGE.parent / f"{path.stem}.svg"
    plot_growth(picture, curves_of(report["rows"]))
    lines = [GROWTH_HEADER, ["---"] * len(GROWTH_HEADER)]
    lines += [growth_cells(points) for points in curves_of(report["rows"]).values()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"### R18, 4 scales: {device}, {hardware['threads']} of {hardware['cores']} threads\n\n"
        f"{report['date']}, torch {report['versions']['torch']}, commit {commit}; "
        f"medians of {report['rounds']} rounds; "
        f"load of the machine before: {report['load_before'][0]:.1f}.\n\n![growth]({picture.name})\n\n{table}\n"
    )


def curves_of(rows):
    """(curve, work) -> its rows, in their order."""
    found = {}
    for row in rows:
        found.setdefault((row["curve"], row["work"]), []).append(row)
    return found


def growth_cells(points):
    """One line of a table: by which factor each quantity grows from the first point to the last."""
    first, last = points[0], points[-1]
    factors = [
        f"x {last[name] / first[name]:.2f}" if first[name] else ""
        for name in ("seconds", "multiply_adds", "extra_bytes", "bytes_counted")
    ]
    ends = f"{first['value']}, {last['value']}"
    return [first["curve"], first["work"], ends, *factors, REASONS[first["curve"]]]


def replaced(page, begin, end, sections):
    """The page with new sections between two marks."""
    before, after = page.split(begin)[0], page.split(end)[1]
    return "\n".join([f"{before}{begin}\n", *sections, f"{end}{after}"])


def write_between(page, marks, sections):
    """Write new sections between the two marks of a page. Creates a missing page, with these sections only.

    Raises:
        DataError: the page has lost its marks.
    """
    make_folder(page.parent)
    text = page.read_text() if page.exists() else "\n".join(marks) + "\n"
    if any(mark not in text for mark in marks):
        raise DataError(f"{page} has lost the marks {' and '.join(marks)}")
    write_whole(page, lambda part: part.write_text(replaced(text, *marks, sections)))


def gpu_page(folder):
    """What the GPU suite found, with the network beside other programs."""
    others = sorted(Path(folder).glob("data/model_cuda_*.json"))
    return "\n".join([report_cuda.page(folder), *map(model_section, others)])


def gpu_picture(folder):
    """A picture of the headline case beside the page."""
    rows = report_cuda.rows_of(folder, "kernels")
    if not rows:
        return ""
    picture = PAGE_CUDA.parent / f"{folder.name}.svg"
    plot_ratios(picture, bars(rows))
    return f"\n![encoder, batch 2: times faster than plain PyTorch]({picture.name})\n"


def main():
    if len(sys.argv) > 1:
        print(gpu_page(sys.argv[1]))
        return
    measured = [gpu_page(folder) + gpu_picture(folder) for folder in sorted(RESULTS.glob("cuda*/"))]
    measured = measured or [report_cuda.NOTHING]
    PAGE_CUDA.write_text(replaced(PAGE_CUDA.read_text(), BEGIN_CUDA, END_CUDA, measured))
    page = PAGE.read_text()
    page = replaced(page, BEGIN, END, [section(path) for path in sorted(RESULTS.glob("deform_attn_*.json"))])
    models = [model_section(path) for path in sorted(RESULTS.glob("model_*.json"))]
    page = replaced(page, BEGIN_MODEL, END_MODEL, models)
    growths = [growth_section(path) for path in sorted(RESULTS.glob("growth_*.json"))]
    PAGE.write_text(replaced(page, BEGIN_GROWTH, END_GROWTH, growths))


if __name__ == "__main__":
    main()
