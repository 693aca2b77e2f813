"""Hardware counters of the attention operator's kernels, read by Nsight Compute (ncu).

    python benchmarks/counters.py --output FILE.json --cases 'encoder batch 2 float32'

It starts `benchmarks/kernels.py --once` under ncu, which replays each kernel until it has read all counters: their
times are not those of a network. Counters that this ncu does not know are left out and named.
"""

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from kernels import CASES, short  # noqa: E402
from measure import origin  # noqa: E402

PERCENT = "avg.pct_of_peak_sustained"
STALLS = ("long_scoreboard", "lg_throttle", "short_scoreboard", "mio_throttle", "barrier", "wait", "math_pipe_throttle")
COUNTERS = {  # what the report calls them: ncu's name
    "microseconds": "gpu__time_duration.sum",
    "blocks": "launch__grid_size",
    "threads of a block": "launch__block_size",
    "registers": "launch__registers_per_thread",
    "instructions": "smsp__inst_executed.sum",
    "issue active %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy %": f"sm__warps_active.{PERCENT}_active",
    "L1 busy %": f"l1tex__throughput.{PERCENT}_active",
    "L2 busy %": f"lts__throughput.{PERCENT}_elapsed",
    "DRAM busy %": f"dram__throughput.{PERCENT}_elapsed",
    "L1 hits %": "l1tex__t_sector_hit_rate.pct",
    "L2 hits %": "lts__t_sector_hit_rate.pct",
    "bank conflicts, loads": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "bank conflicts, stores": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "shared loads": "smsp__inst_executed_op_shared_ld.sum",
    "shared stores": "smsp__inst_executed_op_shared_st.sum",
    "sectors added (RED)": "lts__t_sectors_op_red.sum",
    "sectors of atomics": "lts__t_sectors_op_atom.sum",
    "bytes read": "dram__bytes_read.sum",
    "bytes written": "dram__bytes_write.sum",
    **{f"stall {name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
UNKNOWN = re.compile(r"Failed to find metric (?:regex:)?[\"']?\^?\(?([\w.]+)")
ATTEMPTS = 4  # with fewer counters each, where some are unknown


def command_of(ncu, counters, target):
    options = ["--csv", "--page", "raw", "--print-units", "base"]
    options += ["--profile-from-start", "off", "--nvtx", "--target-processes", "all"]
    options += ["--clock-control", "none", "--cache-control", "none"]  # the caches as the kernel before left them
    return [ncu, *options, "--metrics", ",".join(counters.values()), *target]


def read_counters(ncu, target):
    """Run `target` under ncu -> (its CSV, names of counters it does not know)."""
    counters, missing = dict(COUNTERS), []
    for _ in range(ATTEMPTS):
        done = subprocess.run(command_of(ncu, counters, target), capture_output=True, text=True, cwd=ROOT)
        unknown = set(UNKNOWN.findall(done.stdout + done.stderr))
        if done.returncode == 0 and not unknown:
            return done.stdout, missing
        left = {name: metric for name, metric in counters.items() if metric not in unknown}
        if left == counters:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            sys.exit("\n".join(["ncu failed:", *lines[-15:]]))
        missing += counters.keys() - left.keys()
        counters = left
    sys.exit(f"ncu knows too few of the counters; it refused {missing}")


def parse(text):
    """Rows of ncu's CSV: {"kernel", "range", counter: number}, in the order in which the kernels ran."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = []
    for entry in csv.DictReader(io.StringIO("\n".join(lines))):
        if not entry.get("Kernel Name"):  # the row of units
            continue
        row = {"kernel": short(entry["Kernel Name"]), "range": range_of(entry)}
        for name, metric in COUNTERS.items():
            if (value := number(entry.get(metric))) is not None:
                row[name] = value / 1e3 if name == "microseconds" else value  # base units: nanoseconds
        rows.append(row)
    return rows


def range_of(entry):
    """The mark that kernels.py sets around a pass: case, contender, pass."""
    text = " ".join(str(value) for name, value in entry.items() if name and "Push/Pop" in name)
    found = re.search(r"(encoder|decoder).*?(forward|backward)", text)
    return found.group(0) if found else ""


def number(text):
    try:
        return float(str(text).replace(",", ""))
    except ValueError:
        return None


def say(row):
    shown = [f"{name} {value:.4g}" for name, value in row.items() if name not in ("kernel", "range")]
    print(f"{row['range']}: {row['kernel']}\n    {', '.join(shown)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--cases", default="encoder batch 2 (float32|bfloat16)", help="as of kernels.py")
    parser.add_argument("--contenders", default="compiled|fused|original", help="as of kernels.py")
    parser.add_argument("--original", help="as of kernels.py")
    parser.add_argument("--ncu", default="ncu", help="the program")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args()
    if options.list:
        print(f"{len(COUNTERS)} counters of {sum(bool(re.search(options.cases, str(c))) for c in CASES)} cases")
        return
    target = [sys.executable, "benchmarks/kernels.py", "--once", "--cases", options.cases]
    target += ["--contenders", options.contenders, *(["--original", options.original] if options.original else [])]
    text, missing = read_counters(options.ncu, target)
    report = {**origin(torch.device("cuda")), "unknown_counters": missing, "rows": parse(text)}
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        options.output.with_suffix(".csv").write_text(text)
    for row in report["rows"]:
        say(row)
    if not report["rows"]:
        sys.exit("ncu saw no kernel")


if __name__ == "__main__":
    main()
