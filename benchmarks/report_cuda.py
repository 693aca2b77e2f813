"""Tables of what `tools/gpu_suite.sh` found on a GPU, as Markdown, for docs/performance_cuda.md."""

import json
from pathlib import Path

NOTHING = "No GPU has been measured yet: `make gpu RESULTS=folder` does it.\n"
SHOWN_COUNTERS = (
    *(
        "microseconds",
        "issue active %",
        "occupancy %",
        "L1 hits %",
        "L2 hits %",
        "L1 busy %",
        "L2 busy %",
        "DRAM busy %",
    ),
    *("bank conflicts, loads", "bank conflicts, stores", "sectors added (RED)"),
)


def page(folder):
    """Everything that a folder of results holds; steps that have not run are left out."""
    parts = [heading(folder), network_section(folder), kernel_section(folder), trace_section(folder)]
    return "\n".join(part for part in [*parts, counter_section(folder), step_section(folder)] if part)


def read(folder, name):
    """What a program measured, or nothing."""
    path = Path(folder) / "data" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def rows_of(folder, *names):
    return [row for name in names for row in read(folder, name).get("rows", [])]


def table(header, lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def heading(folder):
    found = read(folder, "device")
    if not found:
        return NOTHING
    hardware, versions = found["hardware"], found["versions"]
    driver = f", driver {hardware['driver_version']}" if "driver_version" in hardware else ""
    clocks = f", at most {hardware['clocks.max.sm']}" if "clocks.max.sm" in hardware else ""
    software = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return (
        f"### {hardware['gpu']}\n\n{found['date']}, compute capability {hardware['capability']}{clocks}{driver}; "
        f"{software}; commit {found['commit'][:10]}; {hardware['cores']} cores of {hardware['cpu']}.\n"
    )


# ---- the operator --------------------------------------------------------------------------------------------------


def microseconds(seconds):
    return f"{1e6 * seconds:,.{1 if seconds < 1e-3 else 0}f} us"


def case_of(row):
    return f"{row['name']}, batch {row['batch']}, {row['dtype']}"


def ratio(other, seconds):
    return f"{other / seconds:.2f}" if other else ""


def kernel_section(folder):
    """Times by events; how many times faster than plain PyTorch and than the original kernel."""
    rows = rows_of(folder, "kernels", "kernels_all")
    if not rows:
        return ""
    seconds = {(case_of(row), row["pass"], row["contender"]): row["seconds"] for row in rows}
    lines = []
    for row in rows:
        here = case_of(row), row["pass"]
        against = [ratio(seconds.get((*here, name)), row["seconds"]) for name in ("reference", "original")]
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f} MiB"
        errors = ", ".join(f"{name} {error:.1g}" for name, error in row["errors"].items())
        lines.append([*here, row["contender"], microseconds(row["seconds"]), *against, memory, errors])
    header = ["case", "pass", "form", "time", "over plain PyTorch", "over the original", "memory", "error"]
    return f"#### The operator\n\n{table(header, lines)}"


def trace_section(folder):
    """Kernel by kernel; one table for all cases."""
    lines = []
    for row in rows_of(folder, "trace", "trace_decoder"):
        if row["contender"] not in ("compiled", "fused", "original"):
            continue
        for kernel in row["kernels"]:
            where = [case_of(row), row["contender"], row["pass"]]
            lines.append([*where, f"`{kernel['kernel']}`", kernel["launches"], microseconds(kernel["seconds"])])
    header = ["case", "form", "pass", "kernel", "launches", "time"]
    return f"#### Kernel by kernel\n\n{table(header, lines)}" if lines else ""


def counter_section(folder):
    rows = rows_of(folder, "counters")
    shown = [name for name in SHOWN_COUNTERS if any(name in row for row in rows)]
    lines = [
        [row["range"], f"`{row['kernel']}`", *(f"{row[name]:,.4g}" if name in row else "" for name in shown)]
        for row in rows
    ]
    return f"#### Hardware counters\n\n{table(['pass', 'kernel', *shown], lines)}" if lines else ""


# ---- the network ---------------------------------------------------------------------------------------------------


def milliseconds(seconds):
    return f"{1e3 * seconds:.1f} ms"


def network_section(folder):
    """The whole network; how many times faster than itself with plain attention, in float32 without TensorFloat-32."""
    compiled = sorted(path.stem for path in Path(folder, "data").glob("compiled_*.json"))
    rows = rows_of(folder, "inference", "training", *compiled, "batches")
    if not rows:
        return ""
    plain = {
        (row["work"], row["batch"]): row["seconds"]
        for row in rows
        if (row["contender"], row["precision"]) == ("reference", "float32") and "error" not in row
    }
    rows.sort(key=lambda row: (row["work"], row["batch"]))
    lines = [network_cells(row, plain.get((row["work"], row["batch"]))) for row in rows]
    header = ["work", "precision", "form", "a step", "ratio", "images per second", "in a row", "host", "GPU busy"]
    return f"#### The network\n\n{table([*header, 'kernels', 'waits', 'memory'], lines)}"


def network_cells(row, plain):
    start = [f"{row['work']}, batch {row['batch']}", row["precision"], row["contender"]]
    if "error" in row:
        return [*start, row["error"], *[""] * 8]
    times = [milliseconds(row[name]) for name in ("seconds_in_a_row", "host_seconds", "busy_seconds")]
    rate = f"{row['batch'] / row['seconds_in_a_row']:.1f}"
    memory = f"{row['peak_bytes'] / 2**20:,.0f} MiB" if row["peak_bytes"] else ""
    counts = [row["kernels"], row.get("waits", ""), memory]
    return [*start, milliseconds(row["seconds"]), ratio(plain, row["seconds"]), rate, *times, *counts]


# ---- how it went ---------------------------------------------------------------------------------------------------


def step_section(folder):
    records = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    records = sorted((r for r in records if "step" in r), key=lambda record: record["when"])
    lines = [[r["step"], r["what"], r["state"], f"{r['seconds']:.0f} s", r["text"].replace("|", "/")] for r in records]
    return f"#### Steps\n\n{table(['step', 'what', 'state', 'time', 'its last line'], lines)}" if lines else ""
