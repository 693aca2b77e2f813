"""Faults that can be planted in the stand-in of the CUDA kernels."""

import ctypes
import os
import re
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from _pytest.runner import runtestprotocol

from dino.layers import self_test

from . import cuda_build
from .cuda_build import Mutant

LIBRARY = "DINO_TEST_STAND_IN"  # a stand-in that is built already, set by the tests that start a test run
PLANTED = "DINO_TEST_PLANTED"  # the number of the mutant that it is to run, 0: none

FORWARD, BACKWARD, SAMPLES, LAUNCHES = (
    f"deform_attn_{name}" for name in ("forward.cuh", "backward.cuh", "samples.cuh", "cuda.cu")
)
SYNC, BLOCK_SYNC = "__syncwarp();", "__syncthreads();"

# A catcher selects tests of test_deform_attn_cuda.py; of two parts with an "and", the second is a parameter. None: the
# reason stands in INVISIBLE.
MUTANTS = {
    # ---- barriers, one at a time
    "forward: samples overwritten while they are read": Mutant(
        FORWARD, "__syncwarp();  // the samples before", SYNC, ";", "more_samples"
    ),
    "forward: samples read before they are there": Mutant(
        FORWARD, "__syncwarp();\n#pragma unroll 2", SYNC, ";", "like_the_reference"
    ),
    "backward: samples overwritten while they are read": Mutant(
        BACKWARD, "__syncwarp();  // the group before", SYNC, ";", "like_the_reference"
    ),
    "backward: samples read before they are there": Mutant(
        BACKWARD, "__syncwarp();\n      float dot[4];", SYNC, ";", "like_the_reference"
    ),
    "backward: kept numbers read before they are there": Mutant(
        BACKWARD, "__syncwarp();  // kept is complete", SYNC, ";", "like_the_reference"
    ),
    "backward: kept numbers overwritten while they are read": Mutant(
        BACKWARD, "__syncwarp();  // and has been read", SYNC, ";", None, self_test=False
    ),
    "backward, any width: scratch read before it is there": Mutant(
        BACKWARD, "__syncwarp();  // scratch is complete", SYNC, ";", "like_the_reference"
    ),
    "sort: the next step before this one is done": Mutant(
        BACKWARD, "__syncwarp();\n    for (int step", SYNC, ";", "long_lists"
    ),
    "sort: the next half before this one is done": Mutant(
        BACKWARD, "      }\n      __syncwarp();\n    }", SYNC, ";", "long_lists"
    ),
    "lists: lanes of one warp not gathered before they exchange": Mutant(
        BACKWARD, "__syncwarp();  // lanes may have", SYNC, ";", None, self_test=False
    ),
    "place: sums of warps read before they are there": Mutant(
        BACKWARD, "warp_sum[warp] = sum;\n  __syncthreads();", BLOCK_SYNC, ";", "long_lists"
    ),
    "place: start of the block read before it is there": Mutant(
        BACKWARD, "__syncthreads();\n  if (i < lists) end[i]", BLOCK_SYNC, ";", "long_lists"
    ),
    # ---- atomic additions made plain
    "count: a plain addition": Mutant(
        BACKWARD,
        "atomicAdd(count + list_of(problem, level, row / problem.queries, head, sample.x, sample.y), 1)",
        "atomicAdd(count + list_of(problem, level, row / problem.queries, head, sample.x, sample.y), 1)",
        "count[list_of(problem, level, row / problem.queries, head, sample.x, sample.y)]++",
        "long_lists",
    ),
    "lists: an entry's place by a plain addition": Mutant(
        BACKWARD,
        "lists.entries[atomicAdd(lists.end + list, 1)]",
        "atomicAdd(lists.end + list, 1)",
        "lists.end[list]++",
        "long_lists",
    ),
    "place: start of a block by a plain addition": Mutant(
        BACKWARD,
        "block_start = atomicAdd(used, all)",
        "atomicAdd(used, all)",
        "(*used += all) - all",
        "cells",
    ),
    "backward: gradients of values by plain additions": Mutant(
        BACKWARD, "atomicAdd(to, x.x), ", "atomicAdd(to, x.x)", "to[0] += x.x", "like_the_reference"
    ),
    "backward, any width: gradients of values by plain additions": Mutant(
        BACKWARD,
        "atomicAdd(sums + start + from[c] + channel, part[c] * g)",
        "atomicAdd(sums + start + from[c] + channel, part[c] * g)",
        "sums[start + from[c] + channel] += part[c] * g",
        "like_the_reference",
    ),
    # ---- bounds
    "sample: no left border": Mutant(SAMPLES, "return x >= 0;", "x >= 0", "true", "like_the_reference"),
    "sample: no upper border": Mutant(SAMPLES, "return y >= 0;", "y >= 0", "true", "like_the_reference"),
    "sample: no right border": Mutant(
        SAMPLES, "return x + 1 < level.width;", "x + 1 < level.width", "true", "like_the_reference"
    ),
    "sample: no lower border": Mutant(
        SAMPLES, "return y + 1 < level.height;", "y + 1 < level.height", "true", "like_the_reference"
    ),
    "sample: inside beyond the right border": Mutant(
        SAMPLES,
        "y > -1 && x < static_cast<A>(level.width)",
        "x < static_cast<A>(level.width)",
        "x < INFINITY",
        "like_the_reference",
    ),
    "sample: inside beyond the upper border": Mutant(
        SAMPLES, "x > -1 && y > -1 &&", "y > -1", "y > -INFINITY", "like_the_reference"
    ),
    "neighbours: not clamped at the left": Mutant(SAMPLES, "max(s.x, 0), right", "max(s.x, 0)", "s.x", "outside"),
    "neighbours: not clamped at the bottom": Mutant(
        SAMPLES, "min(s.y + 1, level.height - 1)", "min(s.y + 1, level.height - 1)", "(s.y + 1)", "outside"
    ),
    "forward: samples beyond the last are read": Mutant(
        FORWARD,
        "if (active && s < problem.samples) {\n          place[k]",
        "active && s < problem.samples",
        "active",
        None,
        self_test=False,
    ),
    "forward: samples beyond the last count": Mutant(
        FORWARD,
        "if (active && s < problem.samples) {\n          const int l",
        "active && s < problem.samples",
        "active",
        "like_the_reference",
    ),
    "forward: queries beyond the border are written": Mutant(
        FORWARD, "if (active) Packet<T>::store", "active", "true", "like_the_reference"
    ),
    "tile: not cut at the right": Mutant(
        SAMPLES, "return x < tile.width && y < tile.height", "x < tile.width", "true", "cells"
    ),
    "tile: not cut at the bottom": Mutant(
        SAMPLES, "return x < tile.width && y < tile.height", "y < tile.height", "true", "cells"
    ),
    "count: threads beyond the last sample": Mutant(
        BACKWARD, "if (i >= total) return;", "i >= total", "false", "cells"
    ),
    "place: threads beyond the last list read": Mutant(
        BACKWARD, "i < lists ? count[i] : 0", "i < lists ? count[i] : 0", "count[i]", "cells"
    ),
    "place: threads beyond the last list write": Mutant(
        BACKWARD, "if (i < lists) end[i]", "i < lists", "true", "cells"
    ),
    "sort: entries beyond the end": Mutant(
        BACKWARD, "if (high < size) order(entries, low, high);\n    }", "high < size", "true", "long_lists"
    ),
    "sort: warps beyond the last list": Mutant(
        BACKWARD, "if (list >= number) return;", "list >= number", "false", "cells"
    ),
    "backward: queries beyond the border finish": Mutant(
        BACKWARD, "if (active) finish_slot", "active", "true", "cells"
    ),
    "lists: cells beyond the right border": Mutant(
        BACKWARD, "x >= level.width || y >= level.height ? -1", "x >= level.width", "false", "cells"
    ),
    "lists: cells beyond the left border": Mutant(BACKWARD, "return x < 0 || y < 0 || x >=", "x < 0", "false", "cells"),
    "lists: lists beyond the row's end": Mutant(
        BACKWARD, "2 * min(first + span, columns)", "min(first + span, columns)", "(first + span)", "cells"
    ),
    "backward, any width: slots beyond the last": Mutant(
        BACKWARD,
        "if (slot >= static_cast<long long>(problem.batch) * problem.queries * problem.heads) return;\n"
        "  const int head = slot % problem.heads, row = slot / problem.heads, image = row / problem.queries;\n"
        "  const int first = slot * problem.samples, stride = problem.heads * problem.dim;\n  const size_t start",
        "slot >= static_cast<long long>(problem.batch) * problem.queries * problem.heads",
        "false",
        "like_the_reference",
    ),
    "heads: threads beyond the last number": Mutant(
        BACKWARD,
        "if (i >= static_cast<long long>(problem.batch) * problem.queries * problem.levels * problem.box)",
        "i >= static_cast<long long>(problem.batch) * problem.queries * problem.levels * problem.box",
        "false",
        "like_the_reference",
    ),
    "launch: less shared memory than samples need": Mutant(
        LAUNCHES, "const size_t shared = kept_bytes(p);", "kept_bytes(p)", "kept_bytes(p) - 16", "cells"
    ),
    # ---- first, last, and parities
    "lists: the second parity believes to be the first": Mutant(
        BACKWARD,
        "const bool first = !odd_rows && !odd_columns, last",
        "!odd_rows && !odd_columns",
        "!odd_rows",
        "cells",
    ),
    "lists: the third parity believes to be the last": Mutant(
        BACKWARD, "last = odd_rows && odd_columns;", "odd_rows && odd_columns", "odd_rows", "cells"
    ),
    "lists: an empty list of the first parity writes no zeros": Mutant(
        BACKWARD, "size == 0 && !first && !(last", "!first", "true", "odd_sizes"
    ),
    "lists: an empty list of the last parity writes no result": Mutant(
        BACKWARD, "!(last && sizeof(T) < sizeof(float))", "last", "false", "odd_sizes"
    ),
    "lists, any width: every parity believes to be the first": Mutant(
        BACKWARD, "*to = first ? sum[c]", "first", "true", "odd_sizes"
    ),
    "launch: a parity left out": Mutant(LAUNCHES, "odd < 4", "odd < 4", "odd < 3", "cells"),
    "launch: a parity twice": Mutant(LAUNCHES, "sum_lists(lists, odd / 2, odd % 2)", "odd % 2", "0", "cells"),
    "lists: rows of both parities in one launch": Mutant(
        BACKWARD, "lists.y = 2 * row + odd_rows - 1", "2 * row + odd_rows - 1", "(int)row - 1", "cells"
    ),
    # ---- off by one
    "forward: chunks overlap": Mutant(FORWARD, "chunk += kChunk", "kChunk", "kChunk - 1", "more_samples"),
    "forward: the last sample of a chunk left out": Mutant(
        FORWARD, "s < count; ++s", "s < count", "s < count - 1", "like_the_reference"
    ),
    "backward: groups overlap": Mutant(BACKWARD, "group += kLanes", "kLanes", "kLanes - 1", "cells"),
    "tile: rows and columns of tiles mixed up": Mutant(
        SAMPLES, "tile.y = (number / columns)", "number / columns", "number % columns", "cells"
    ),
    "launch: the last tile left out": Mutant(
        LAUNCHES,
        "p.tiles = blocks_for(p.queries, slots)",
        "blocks_for(p.queries, slots)",
        "max<int>(1, p.queries / slots)",
        "long_lists",
    ),
    "lists: the first entry left out": Mutant(
        BACKWARD, "int i = end - size + lane / kLanes", "end - size", "end - size + 1", "cells"
    ),
    "lists: the last entry left out": Mutant(BACKWARD, "i < end; i += kEntries", "i < end", "i < end - 1", "cells"),
    "lists, any width: the first entry left out": Mutant(
        BACKWARD, "int i = end - size; i < end", "end - size", "end - size + 1", "odd_sizes"
    ),
    "lists: steps too short": Mutant(
        BACKWARD,
        "mine.x += kListStep) {\n    const int list = list_of(problem, level, mine.image, mine.head, mine.x, mine.y);\n"
        "    const int size = lists.count[list], end = lists.end[list];\n    if (size",
        "kListStep",
        "kListStep / 2",
        "cells",
    ),
    "sort: only runs of up to a warp": Mutant(
        BACKWARD, "1 << log < size; ++log", "1 << log < size", "1 << log < min(size, 32)", "long_lists"
    ),
    "heads: the last left out": Mutant(
        BACKWARD,
        "for (int head = 0; head < problem.heads; ++head) {\n    const size_t slot",
        "head < problem.heads",
        "head < problem.heads - 1",
        "like_the_reference",
    ),
    "level of a sample: rounded down": Mutant(
        LAUNCHES, "((int64_t{1} << 32) + p.points - 1) / p.points", "p.points - 1", "0", "odd_sizes"
    ),
    # ---- arithmetic, and types
    "float: two channels swapped": Mutant(
        SAMPLES,
        "x[0] = bits.x, x[1] = bits.y",
        "x[0] = bits.x, x[1] = bits.y",
        "x[0] = bits.y, x[1] = bits.x",
        "like_the_reference",
    ),
    "half: halves of a word swapped": Mutant(
        SAMPLES, "(words[i] & 0xffffu))", "words[i] & 0xffffu", "words[i] >> 16", "like_the_reference"
    ),
    "bfloat16: halves of a word swapped": Mutant(
        SAMPLES, "__uint_as_float(words[i] << 16)", "words[i] << 16", "words[i] & 0xffff0000u", "like_the_reference"
    ),
    "bfloat16: results cut off, not rounded": Mutant(
        SAMPLES,
        "words[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[2 * i])) |",
        "__float2bfloat16_rn(x[2 * i])",
        "__float2bfloat16_rn(__uint_as_float(__float_as_int(x[2 * i]) & 0xfff00000u))",
        "like_the_reference",
    ),
    "bfloat16: offsets read in one another's place": Mutant(
        SAMPLES,
        "__bfloat1622float2(__ldg(static_cast<const __nv_bfloat162*>(numbers.data) + pair))",
        "pair",
        "pair ^ 1",
        "like_the_reference",
    ),
    "neighbours: every level begins at the first token": Mutant(
        SAMPLES, "top = level.start + max(s.y, 0)", "level.start", "0", "like_the_reference"
    ),
    "forward: a corner dropped": Mutant(FORWARD, "fmaf(part.w, d[v], sum[v]);", "part.w", "0.0f", "like_the_reference"),
    "backward: a corner dropped": Mutant(
        BACKWARD, "s.inside && right && bottom ? dot[3] : 0", "dot[3]", "0", "like_the_reference"
    ),
    "lists: corners mixed up": Mutant(
        BACKWARD,
        "upper * entry.x, lower - lower * entry.x",
        "lower - lower * entry.x",
        "lower * entry.x",
        "cells",
    ),
    "forward: reads of another head": Mutant(
        FORWARD,
        "channel = tile.head * D + lane * kSize",
        "tile.head * D",
        "(problem.heads - 1 - tile.head) * D",
        "like_the_reference",
    ),
    "backward: writes into another image": Mutant(
        BACKWARD, "sums + image + tile.head * D + lane * 4", "image", "0", "like_the_reference"
    ),
    "boxes: sides not halved": Mutant(
        SAMPLES,
        "half = static_cast<A>(0.5) / static_cast<A>(problem.points);\n      s.unit_x",
        "static_cast<A>(0.5)",
        "static_cast<A>(1)",
        "like_the_reference",
    ),
    "boxes: gradients of sides not scaled": Mutant(
        BACKWARD, "if (coordinate > 1) sum", "coordinate > 1", "false", "like_the_reference"
    ),
    "softmax: over all but the last lane's samples": Mutant(
        SAMPLES,
        "const int end = active ? problem.samples : 0;",
        "problem.samples",
        "problem.samples - 1",
        "like_the_reference",
    ),
}


# Why nothing notices: what is left out makes no difference.
INVISIBLE = {
    "backward: kept numbers overwritten while they are read": "before a number is kept again, every lane passes the "
    "barrier after which the next group of samples is written",
    "lists: lanes of one warp not gathered before they exchange": "each exchange waits for all lanes itself",
    "forward: samples beyond the last are read": "they belong to the next head or lie in memory that nobody else uses; "
    "what was read is not used",
}


def build(folder):
    """The path of a stand-in with all mutants in it, none of them switched on."""
    return cuda_build.build_stand_in(folder, list(MUTANTS.values()))


def load(path):
    """Load a stand-in; the result's `plant(number)` switches a mutant on, 0 all of them off."""
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.plant(int(os.environ.get(PLANTED, 0)))
    return library


# ---- the run


class Outcome(NamedTuple):
    """What became of a mutant."""

    noticed: bool
    by: str  # the test, or "self-test"
    how: str  # the message


def in_a_child(function, seconds):
    """(exit status, output) of `function`, which returns an exit status, in a copy of this process that may die."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            signal.alarm(seconds)
            status = BROKEN
            try:
                status = function()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        return status, file.read().decode(errors="replace")


BROKEN = 70  # the exit status of a run that failed itself
MESSAGE = re.compile(r"^(?:block \d+, thread \d+|refused|E +AssertionError): (.*)", re.M)


def outcome_of(status, output):
    """Status 0 means that nothing was noticed."""
    assert status != BROKEN, output
    message = MESSAGE.search(output)
    names = re.findall(r"^running (\w+)", output, re.M)
    return Outcome(status != 0, names[-1], message[1] if message else f"status {status}" if status else "")


def run_items(items, number):
    """The outcome of tests that pytest has collected, with a mutant switched on; they end with the first that fails."""

    def function():
        os.environ[PLANTED] = str(number)
        for item, following in zip(items, [*items[1:], None], strict=True):
            print("running", item.name, flush=True)
            failed = [report for report in runtestprotocol(item, log=False, nextitem=following) if report.failed]
            if failed:
                print(failed[0].longreprtext)
                return 1
        return 0

    return outcome_of(*in_a_child(function, seconds=600))


def run_self_test(library, number):
    """The outcome of the self-test with a mutant switched on."""

    def function():
        library.plant(number)
        print("running self_test", flush=True)
        try:
            self_test.check(torch.ops.dino_on_cpu, torch.device("cpu"))
        except (AssertionError, RuntimeError) as error:
            print(f"refused: {error}")
            return 1
        return 0

    return outcome_of(*in_a_child(function, seconds=600))


class Runs:
    """A plugin of pytest that runs the collected tests once for each mutant, instead of once."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.surprises = []

    def pytest_runtestloop(self, session):
        library = load(os.environ[LIBRARY])
        items = [item for item in session.items if "stand_in" in item.name]
        for number in self.numbers:
            name, mutant = list(MUTANTS.items())[number - 1]
            catchers = [item for item in items if (mutant.catcher or "") in item.name]
            tests, itself = run_items(catchers, number), run_self_test(library, number)
            if tests.noticed != (mutant.catcher is not None) or itself.noticed != mutant.self_test:
                self.surprises.append(name)
            print(f"| {name} | {tests.by if tests.noticed else '-'} | {tests.how} | {itself.how or '-'} |", flush=True)
        return True


def main():
    """Run all mutants, or those whose numbers are given. Print a line for each, and what MUTANTS is wrong about."""
    os.environ[LIBRARY] = os.environ.get(LIBRARY) or str(build(Path(tempfile.mkdtemp())))
    runs = Runs([int(x) for x in sys.argv[1:]] or range(1, len(MUTANTS) + 1))
    tests = str(Path(__file__).with_name("test_deform_attn_cuda.py"))
    pytest.main(
        [tests, "-s", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:faulthandler"], plugins=[runs]
    )
    sys.exit(f"not as expected: {', '.join(runs.surprises)}" if runs.surprises else 0)


if __name__ == "__main__":
    main()
