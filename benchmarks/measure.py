"""What the benchmark programs share: clocks, memory, and what a result must say of its origin.

`python benchmarks/measure.py --output FILE` writes the origin of results on this machine's CUDA GPU.
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MIB = 2**20


def clock(device):
    """Wall and processor time in seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def memory_in_use(entry):
    """VmRSS or VmHWM of this process, in bytes."""
    return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def peak_memory(run, device):
    """Run once -> (bytes in use before, at most while it runs, result); None where the first two are unknown."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        return before, torch.cuda.max_memory_allocated(device), result
    if not Path("/proc/self/clear_refs").exists():
        return None, None, run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = memory_in_use("VmRSS")
    result = run()
    return before, memory_in_use("VmHWM"), result


class Worker:
    """A process that answers a line with a line of JSON, so that programs share neither memory nor settings."""

    def __init__(self, command, environment=None):
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words):
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a worker ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def hardware(device):
    """Names of processor and GPU, cores, threads, and the processor's instructions for bfloat16."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", text)
    found = {
        "cpu": model.group(1) if model else platform.processor(),
        "bfloat16": sorted(set(re.findall(r"\b\w+_bf16\b", text))),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return found | (gpu_facts(device) if device.type == "cuda" else {})


def gpu_facts(device):
    """Name, compute capability, memory, driver and clocks of a GPU; the last two where nvidia-smi tells them."""
    properties = torch.cuda.get_device_properties(device)
    found = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_bytes": properties.total_memory,
    }
    queries = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"]
    said = answer_of("nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader")
    values = (said or "").splitlines()[:1]
    return found | (dict(zip(queries, values[0].split(", "), strict=False)) if values else {})


def answer_of(*command, folder=ROOT):
    """The standard output of a command, or None where it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git(*arguments, folder=ROOT):
    """What git answers, or None."""
    return answer_of("git", *arguments, folder=folder)


def versions(device):
    """Of torch and Python; on a GPU also of CUDA, nvcc and triton."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return found
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    release = re.search(r"release (\S+),", (nvcc and answer_of(nvcc, "--version")) or "")
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": release.group(1) if release else None,
        "triton": version_of("triton"),
    }


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def origin(device):
    """Hardware, versions, commit, date and load of the machine.

    The variable DINO_COMMIT names the commit of a copy of the sources that has no repository, or another one.
    """
    return {
        "hardware": hardware(device),
        "versions": versions(device),
        "commit": os.environ.get("DINO_COMMIT") or git("rev-parse", "HEAD") or "unknown",
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU")
    found = origin(torch.device("cuda"))
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['hardware']['gpu']}, {', '.join(f'{k} {v}' for k, v in found['versions'].items())}")


if __name__ == "__main__":
    main()
