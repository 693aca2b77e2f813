"""What the benchmark programs share: clocks, memory, and what a result must say of its origin."""

import ctypes
import datetime
import gc
import os
import platform
import re
import subprocess
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
    """Run once -> (bytes in use before, at most while it runs, result); None where the first two can't be told."""
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
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def git(*arguments, folder=ROOT):
    """What git answers, or None."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def origin(device):
    """Hardware, versions, commit, date and load of the machine."""
    return {
        "hardware": hardware(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg(),
    }
