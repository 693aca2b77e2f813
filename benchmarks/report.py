"""`python benchmarks/report.py`: tables and plots of docs/performance.md, from what the other programs here wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- begin: made by benchmarks/report.py -->", "<!-- end -->"
BEGIN_MODEL, END_MODEL = "<!-- begin: the model, made by benchmarks/report.py -->", "<!-- end of the model -->"
COLOURS = {"reference": "#9aa5b1", "compiled": "#2f6fb5", "fused": "#e08e2b", "public": "#5c9e5c"}
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


def bar(x, y, length, colour):
    return f'<rect x="{x}" y="{y + 2}" width="{length:.1f}" height="12" fill="{colour}"/>'


def plot(report):
    """An SVG picture: how many times faster than the reference, one bar for each case and pass."""
    found = references(report["rows"])
    rows = [row for row in report["rows"] if row["contender"] != "reference"]
    ratios = [found[key(row)]["seconds"] / row["seconds"] for row in rows]
    left, width, line = 290, 420, 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{line * len(rows) + 40}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="16">times faster than the reference (in grey: 1)</text>',
    ]
    for number, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        y, length = 26 + number * line, width * ratio / max(ratios)
        label = f"{row['name']}, batch {row['batch']}, {row['dtype']}, {row['pass']}"
        parts += [
            f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{label}</text>',
            bar(left, y, length, COLOURS[row["contender"]]),
            bar(left, y, width / max(ratios), COLOURS["reference"]),
            f'<text x="{left + length + 4:.1f}" y="{y + 11}">{ratio:.1f} {row["contender"]}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def section(path):
    """What the page says about one file of results."""
    report = json.loads(path.read_text())
    hardware, build = report["hardware"], report["build"] or {}
    device = hardware.get("gpu", f"{hardware['cpu']}, {report['kernels']} kernels")
    commit = report["commit"][:10] + (" with changes" if report["changed_since_commit"] else "")
    load = report["load_before"][0]
    picture = PAGE.parent / f"{path.stem}.svg"
    picture.write_text(plot(report))
    against = "" if report["against"] else " No public CUDA kernel was at hand: not measured against one."
    return (
        f"### {device}, {hardware['threads']} of {hardware['cores']} threads\n\n"
        f"{report['date']}, torch {report['versions']['torch']}, {build.get('compiler', 'unknown compiler')}, commit "
        f"{commit}, medians of {report['rounds']} rounds; load of the machine before: {load:.1f}.{against}\n\n"
        f"![ratios]({picture.name})\n\n{table(report)}\n"
    )


MODEL_HEADER = ["case", "program", "time", "ratio", "processor time", "its ratio", "peak memory", "difference"]


def model_section(path):
    """What the page says about one file of results of the whole model; ratios are to the slowest program's row."""
    report = json.loads(path.read_text())
    hardware = report["hardware"]
    commit = report["commit"][:10] + (" with changes" if report["changed_since_commit"] else "")
    device = hardware.get("gpu", hardware["cpu"])
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


def replaced(page, begin, end, sections):
    """The page with new sections between two marks."""
    before, after = page.split(begin)[0], page.split(end)[1]
    return "\n".join([f"{before}{begin}\n", *sections, f"{end}{after}"])


def main():
    page = PAGE.read_text()
    page = replaced(page, BEGIN, END, [section(path) for path in sorted(RESULTS.glob("deform_attn_*.json"))])
    models = [model_section(path) for path in sorted(RESULTS.glob("model_*.json"))]
    PAGE.write_text(replaced(page, BEGIN_MODEL, END_MODEL, models))


if __name__ == "__main__":
    main()
