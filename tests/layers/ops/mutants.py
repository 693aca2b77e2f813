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

from dino.layers.ops import self_test

from . import cuda_build
from .cuda_build import Mutant

LIBRARY = "DINO_TEST_STAND_IN"  # a stand-in that is built already, set by the tests that start a test run
PLANTED = "DINO_TEST_PLANTED"  # the number of the mutant that it is to run, 0: none

FORWARD, BACKWARD, TILES, LISTS, DETERMINISTIC, SAMPLES, LAUNCHES = (
    f"deform_attn_{name}"
    for name in ("forward.cuh", "backward.cuh", "tiles.cuh", "lists.cuh", "deterministic.cuh", "samples.cuh", "cuda.cu")
)
SYNC, BLOCK_SYNC = "__syncwarp();", "__syncthreads();"

# A catcher selects tests of test_deform_attn_cuda.py by a part of their names. None: the reason stands in INVISIBLE.
MUTANTS = {
    # ---- barriers, one at a time
    "forward: samples overwritten while they are read": Mutant(
        FORWARD, "__syncwarp();  // the samples before", SYNC, ";", "more_samples"
    ),
    "forward: samples read before they are there": Mutant(
        FORWARD, "__syncwarp();\n#pragma unroll 1", SYNC, ";", "like_the_reference"
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
    "tiles: samples counted before the counts are zero": Mutant(
        TILES, "memory.keys[i] = 0;\n  __syncthreads();", BLOCK_SYNC, ";", "are_cells"
    ),
    "tiles: counts summed before all samples are counted": Mutant(
        TILES, "__syncthreads();\n  const int inside", BLOCK_SYNC, ";", "are_cells"
    ),
    "tiles: sums of warps read before they are there": Mutant(
        TILES, "warp_sum[warp] = sum;\n  __syncthreads();", BLOCK_SYNC, ";", "are_cells"
    ),
    "tiles: first places read before they are there": Mutant(
        TILES, "__syncthreads();\n  return all;", BLOCK_SYNC, ";", "are_cells"
    ),
    "tiles: rows loaded over places that are read": Mutant(
        TILES, "sort_tile(problem, tile, memory, all);\n  __syncthreads();", BLOCK_SYNC, ";", "are_cells"
    ),
    "tiles: rows read before they are there": Mutant(
        TILES, "__syncthreads();\n  walk_tile", BLOCK_SYNC, ";", "are_cells"
    ),
    "tiles: samples overwritten while they are read": Mutant(
        TILES, "__syncwarp();  // the samples have been read", SYNC, ";", "are_cells"
    ),
    "tiles: gradients read before they are there": Mutant(
        TILES,
        "walk_tile<T, D, ADD>(problem, tile, memory, inside, value, sums);\n  __syncthreads();",
        BLOCK_SYNC,
        ";",
        "are_cells",
    ),
    "sort: the next step before this one is done": Mutant(
        DETERMINISTIC, "__syncwarp();\n    for (int step", SYNC, ";", "long_lists"
    ),
    "sort: the next half before this one is done": Mutant(
        DETERMINISTIC, "      }\n      __syncwarp();\n    }", SYNC, ";", "long_lists"
    ),
    "lists: lanes of one warp not gathered before they exchange": Mutant(
        DETERMINISTIC, "__syncwarp();  // lanes may have", SYNC, ";", None, self_test=False
    ),
    "place: sums of warps read before they are there": Mutant(
        LISTS, "warp_sum[warp] = sum;\n  __syncthreads();", BLOCK_SYNC, ";", "long_lists"
    ),
    "place: start of the block read before it is there": Mutant(
        LISTS, "__syncthreads();\n  if (i < number) lists.end[i]", BLOCK_SYNC, ";", "long_lists"
    ),
    # ---- atomic additions made plain
    "tiles: counts by plain additions": Mutant(
        TILES,
        "noted = atomicAdd(memory.keys + place_of(key), 1)",
        "atomicAdd(memory.keys + place_of(key), 1)",
        "memory.keys[place_of(key)]++",
        "are_cells",
    ),
    "rank: a plain addition": Mutant(
        LISTS,
        "atomicAdd(lists.count + list[k], 1)",
        "atomicAdd(lists.count + list[k], 1)",
        "lists.count[list[k]]++",
        "long_lists",
    ),
    "place: start of a block by a plain addition": Mutant(
        LISTS,
        "first_entry = atomicAdd(lists.used, all)",
        "atomicAdd(lists.used, all)",
        "(*lists.used += all) - all",
        "are_cells",
    ),
    "gradients of values by plain additions": Mutant(
        SAMPLES, "atomicAdd(to, x.x), ", "atomicAdd(to, x.x)", "to[0] += x.x", "like_the_reference"
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
        SAMPLES, "return x < tile.width && y < tile.height", "x < tile.width", "true", "are_cells"
    ),
    "tile: not cut at the bottom": Mutant(
        SAMPLES, "return x < tile.width && y < tile.height", "y < tile.height", "true", "are_cells"
    ),
    "tiles: queries beyond the border are located": Mutant(
        TILES, "row[k] = query < 0 ? -1", "query < 0", "false", "are_cells"
    ),
    "tiles: lanes beyond the last sample read one": Mutant(
        TILES, "row[k] >= 0 && lane < problem.samples", "lane < problem.samples", "true", None, self_test=False
    ),
    "tiles: samples beyond the last are kept": Mutant(
        TILES, "s < (row[0] < 0 ? 0 : problem.samples)", "problem.samples", "(problem.samples | 15)", "every_width"
    ),
    "tiles: queries beyond the border are sorted": Mutant(
        TILES,
        "query_of_tile(problem, tile, query) < 0 ? 0 : memory",
        "query_of_tile(problem, tile, query) < 0",
        "false",
        "are_cells",
    ),
    "tiles: samples outside are sorted": Mutant(
        TILES, "if (!(place >> 29)) continue;", "!(place >> 29)", "false", "are_cells"
    ),
    "tiles: rows beyond the border are loaded": Mutant(
        TILES, "if (query < 0) continue;", "query < 0", "false", None, self_test=False
    ),
    "tiles: the last group goes beyond the last sample": Mutant(
        TILES, "end = min(first + steps, all);", "min(first + steps, all)", "(first + steps)", "are_cells"
    ),
    "tiles: groups go beyond their part": Mutant(
        TILES, "if (i + k < end) {", "i + k < end", "i + k < all", "are_cells"
    ),
    "tiles: lanes without a sample read one": Mutant(
        TILES, "if (own < end) order =", "own < end", "own < all", "are_cells"
    ),
    "tiles: lanes without a sample write one": Mutant(
        TILES, "if (own < end && !right", "own < end", "own < all", "are_cells"
    ),
    "tiles: queries beyond the border finish": Mutant(
        TILES, "end = query >= 0 ? problem.samples : 0", "query >= 0", "true", "are_cells"
    ),
    "tiles: the reference of queries beyond the border": Mutant(
        TILES, "gradients.reference && query >= 0", "query >= 0", "true", "are_cells"
    ),
    "rank: threads beyond the last sample": Mutant(
        LISTS, "if (i >= total) continue;", "i >= total", "false", "are_cells"
    ),
    "rank: threads beyond the last sample write": Mutant(
        LISTS, "if (i < total) lists.rank[i]", "i < total", "true", "are_cells"
    ),
    "place: threads beyond the last list read": Mutant(
        LISTS, "i < number ? lists.count[i] : 0", "i < number ? lists.count[i] : 0", "lists.count[i]", "are_cells"
    ),
    "place: threads beyond the last list write": Mutant(
        LISTS, "if (i < number) lists.end[i]", "i < number", "true", "are_cells"
    ),
    "entries: threads beyond the last query": Mutant(LISTS, "if (!active) return;", "!active", "false", "are_cells"),
    "entries: of samples outside": Mutant(LISTS, "if (rank < 0) continue;", "rank < 0", "false", "are_cells"),
    "sort: entries beyond the end": Mutant(
        DETERMINISTIC, "if (high < size) order(entries, low, high);\n    }", "high < size", "true", "long_lists"
    ),
    "sort: warps beyond the last list": Mutant(
        DETERMINISTIC, "if (list >= number) return;", "list >= number", "false", None, self_test=False
    ),
    "backward: queries beyond the border finish": Mutant(
        BACKWARD, "if (active) finish_slot", "active", "true", "like_the_reference"
    ),
    "lists: cells beyond the right border": Mutant(
        DETERMINISTIC, "x >= level.width || y >= level.height ? -1", "x >= level.width", "false", "are_cells"
    ),
    "lists: cells beyond the left border": Mutant(
        DETERMINISTIC, "return x < 0 || y < 0 || x >=", "x < 0", "false", "are_cells"
    ),
    "lists: lists beyond the row's end": Mutant(
        DETERMINISTIC, "2 * min(first + span, columns)", "min(first + span, columns)", "(first + span)", "are_cells"
    ),
    "backward, any width: slots beyond the last": Mutant(
        BACKWARD,
        "if (slot >= static_cast<long long>(problem.batch) * problem.queries * problem.heads) return;\n"
        "  const int head = slot % problem.heads, row = slot / problem.heads, image = row / problem.queries;\n"
        "  const int first = slot * problem.samples, stride = problem.heads * problem.dim;\n  const size_t start",
        "slot >= static_cast<long long>(problem.batch) * problem.queries * problem.heads",
        "false",
        "odd_sizes",
        self_test=False,  # its slots fill all blocks
    ),
    "heads: threads beyond the last number": Mutant(
        BACKWARD,
        "if (i >= static_cast<long long>(problem.batch) * problem.queries * problem.levels * problem.box)",
        "i >= static_cast<long long>(problem.batch) * problem.queries * problem.levels * problem.box",
        "false",
        "like_the_reference",
    ),
    "launch: less shared memory than kept numbers need": Mutant(
        LAUNCHES,
        "run(backward_packets<T, D, true>, kept_bytes(p))",
        "kept_bytes(p)",
        "kept_bytes(p) - 16",
        "like_the_reference",
    ),
    "launch: less shared memory than a tile needs": Mutant(
        LAUNCHES,
        "tile_bytes(queries, p.samples, kDim * sizeof(T))",
        "tile_bytes(queries, p.samples, kDim * sizeof(T))",
        "tile_bytes(queries, p.samples, kDim * sizeof(T) / 2)",
        "are_cells",
    ),
    "launch: a tile of more samples than 12 bits can number": Mutant(
        LAUNCHES,
        "queries) * p.samples <= kMostTileSamples",
        "kMostTileSamples",
        "2 * kMostTileSamples",
        "many_samples",
        self_test=False,
    ),
    # ---- tiles: bits, columns, lanes
    "tiles: rank cut to 11 bits": Mutant(
        TILES, "(place & 0xfffu)", "place & 0xfffu", "place & 0x7ffu", "one_cell", False
    ),
    "tiles: a key cut to 11 bits": Mutant(
        TILES, "place_of(place >> 12 & (kKeys - 1))", "kKeys - 1", "kKeys / 2 - 1", "are_cells"
    ),
    "tiles: number cut to 11 bits": Mutant(
        TILES, "= i | (place >> 24", "i", "(i & 0x7ff)", "one_cell", self_test=False
    ),
    "tiles: query cut to 6 bits": Mutant(
        TILES, "static_cast<unsigned>(query) << kQueryAt", "static_cast<unsigned>(query)", "(query & 63u)", "are_cells"
    ),
    "tiles: level cut to 2 bits": Mutant(
        TILES, "level << kLevelAt |", "level", "(level & 3)", "share", self_test=False
    ),
    "tiles: neighbours without the upper left bit": Mutant(
        TILES, "(place >> 24 & 31u)", "place >> 24 & 31u", "place >> 24 & 30u", "are_cells"
    ),
    "tiles: all cells of even columns": Mutant(
        TILES, "(place >> 24 & 31u)", "place >> 24 & 31u", "place >> 24 & 15u", None, self_test=False
    ),
    "tiles: keys without rows": Mutant(TILES, "(y & 31) << 5", "(y & 31) << 5", "0", None, self_test=False),
    "tiles: lanes believe to be left by their number alone": Mutant(
        TILES, "const unsigned right = (order >> kOddAt ^ odd) & 1;", "order >> kOddAt ^ odd", "odd", "are_cells"
    ),
    "tiles: the column to the right is the left one": Mutant(
        TILES, "static_cast<int>(right) : -1", "static_cast<int>(right)", "0", "are_cells"
    ),
    "tiles: a right column at the border is there": Mutant(
        TILES,
        "const bool there = order >> kNeighboursAt & (right ? kHasRight : kHasLeft);",
        "right ? kHasRight : kHasLeft",
        "kHasLeft | kHasRight",
        "are_cells",
    ),
    "tiles: the lower token is the next one": Mutant(
        TILES, "? width * stride : 0", "width * stride", "stride", "are_cells"
    ),
    "tiles: the lower token is a row below at the border, too": Mutant(
        TILES, "(vertical & kRows) == kRows ?", "(vertical & kRows) == kRows", "true", "are_cells"
    ),
    "tiles: the same column though one of its rows is missing": Mutant(
        TILES, "|| vertical != column.vertical", "vertical != column.vertical", "false", "share", self_test=False
    ),
    "tiles: a column is left without a word": Mutant(TILES, "leave();\n    token = to", "leave();", ";", "are_cells"),
    "tiles: the last column is left without a word": Mutant(
        TILES, "column.leave();", "column.leave();", ";", "are_cells"
    ),
    "tiles: sums of the column before go on": Mutant(
        TILES,
        "lower);\n#pragma unroll\n    for (int v = 0; v < 8; ++v) upper_sum[v] = lower_sum[v] = 0;",
        "upper_sum[v] = lower_sum[v] = 0;",
        ";",
        "are_cells",
    ),
    "tiles: the upper token gets something though it is beyond the border": Mutant(
        TILES, "if (vertical & kHasTop << kNeighboursAt)", "vertical & kHasTop << kNeighboursAt", "true", "are_cells"
    ),
    "tiles: channels of the second half four further": Mutant(
        TILES, "add_atomically(to + kHalf", "kHalf", "4", "are_cells"
    ),
    "tiles: products of another sample": Mutant(
        TILES, "own = i + lane / kSpare", "lane / kSpare", "lane % kSpare", "are_cells"
    ),
    "tiles: spare lanes write, too": Mutant(
        TILES, "!right && lane % kSpare == 0", "lane % kSpare == 0", "true", "are_cells"
    ),
    "tiles: no product with an upper token beyond the border": Mutant(
        TILES, "there & kHasTop ? dot[0]", "there & kHasTop", "true", "are_cells"
    ),
    "tiles: samples of a later query kept in the place of the first": Mutant(
        TILES, "(from + k * kStep) * problem.samples + s", "k * kStep", "0", "are_cells"
    ),
    "tiles: samples beyond the 16th are the first ones": Mutant(
        TILES, "if (s != lane) {", "s != lane", "false", "many_samples"
    ),
    "tiles: softmax over the first 16 samples": Mutant(
        TILES, "soft = problem.samples <= kSlotLanes ?", "problem.samples <= kSlotLanes", "true", "many_samples"
    ),
    "tiles: the token of a cell above the image": Mutant(
        TILES, "max(sample.y, 0)", "max(sample.y, 0)", "sample.y", "are_cells"
    ),
    "tiles: sums of one warp too many": Mutant(TILES, "if (w < warp) start", "w < warp", "w <= warp", "are_cells"),
    "tiles: softmax backward without the mean": Mutant(TILES, "samples[s].y - weighted", "weighted", "0", "are_cells"),
    "tiles: gradients of places not scaled": Mutant(TILES, "sample.z * unit.x", "unit.x", "1.0f", "are_cells"),
    # ---- lists: copies, parities
    "lists: only the first copy of a cell": Mutant(
        DETERMINISTIC,
        "lists.end[list + (1 << level.copies_log2) - 1]",
        "(1 << level.copies_log2) - 1",
        "0",
        "are_cells",
    ),
    "lists: cells overlap": Mutant(
        LISTS, "(cell << level.copies_log2) + copy", "cell << level.copies_log2", "cell", "long_lists"
    ),
    "lists: copies of a cell in two blocks": Mutant(
        LAUNCHES,
        "lists += blocks_for(cells << copies, kMaxCopies) * kMaxCopies;",
        "blocks_for(cells << copies, kMaxCopies) * kMaxCopies",
        "(cells << copies)",
        "several_lists",
        self_test=False,
    ),
    "lists: sums of an image go to the first one": Mutant(
        LAUNCHES, "some.sums += image * tokens", "image * tokens", "0", "are_cells", self_test=False
    ),
    "lists: the second parity believes to be the first": Mutant(
        DETERMINISTIC,
        "const bool first = !odd_rows && !odd_columns, last",
        "!odd_rows && !odd_columns",
        "!odd_rows",
        "are_cells",
    ),
    "lists: the third parity believes to be the last": Mutant(
        DETERMINISTIC, "last = odd_rows && odd_columns;", "odd_rows && odd_columns", "odd_rows", "are_cells"
    ),
    "lists: an empty cell of the first parity writes no zeros": Mutant(
        DETERMINISTIC, "entries.end && !first && !(last", "!first", "true", "odd_sizes"
    ),
    "lists: an empty cell of the last parity writes no result": Mutant(
        DETERMINISTIC, "!(last && sizeof(T) < sizeof(float))", "last", "false", "odd_sizes"
    ),
    "lists, any width: every parity believes to be the first": Mutant(
        DETERMINISTIC, "*to = first ? sum[c]", "first", "true", "odd_sizes"
    ),
    "launch: a parity left out": Mutant(LAUNCHES, "odd < 4", "odd < 4", "odd < 3", "are_cells"),
    "launch: a parity twice": Mutant(LAUNCHES, "sum_lists(lists, odd / 2, odd % 2)", "odd % 2", "0", "are_cells"),
    "lists: rows of both parities in one launch": Mutant(
        DETERMINISTIC, "cells.y = 2 * row + odd_rows - 1", "2 * row + odd_rows - 1", "(int)row - 1", "are_cells"
    ),
    # ---- off by one
    "forward: chunks overlap": Mutant(FORWARD, "chunk += kChunk", "kChunk", "kChunk - 1", "more_samples"),
    "forward: the last sample of a chunk left out": Mutant(
        FORWARD, "s < count; ++s", "s < count", "s < count - 1", "like_the_reference"
    ),
    "backward: groups overlap": Mutant(BACKWARD, "group += kLanes", "kLanes", "kLanes - 1", "like_the_reference"),
    "tile: rows and columns of tiles mixed up": Mutant(
        SAMPLES, "tile.y = (number / columns)", "number / columns", "number % columns", "are_cells"
    ),
    "tile: of another head": Mutant(
        SAMPLES,
        "(image_and_head % groups) << problem.heads_log2",
        "(image_and_head % groups) << problem.heads_log2",
        "(image_and_head % groups)",
        "every_width",
        False,
    ),
    "launch: the last tile left out": Mutant(
        LAUNCHES,
        "p.tiles = blocks_for(p.queries, slots)",
        "blocks_for(p.queries, slots)",
        "std::max<int>(1, p.queries / slots)",
        "long_lists",
    ),
    "lists: the first entry left out": Mutant(
        DETERMINISTIC, "int i = entries.begin + lane / kLanes", "entries.begin", "entries.begin + 1", "are_cells"
    ),
    "lists: the last entry left out": Mutant(
        DETERMINISTIC, "i < entries.end; i += kEntries", "i < entries.end", "i < entries.end - 1", "are_cells"
    ),
    "lists, any width: the first entry left out": Mutant(
        DETERMINISTIC, "int i = entries.begin; i < entries.end", "entries.begin", "entries.begin + 1", "odd_sizes"
    ),
    "lists: steps too short": Mutant(
        DETERMINISTIC,
        "mine.x += kCellStep) {\n    const Range entries = entries_of(problem, lists, level, mine);\n    if",
        "kCellStep",
        "kCellStep / 2",
        "are_cells",
    ),
    "sort: only runs of up to a warp": Mutant(
        DETERMINISTIC, "1 << log < size; ++log", "1 << log < size", "1 << log < min(size, 32)", "long_lists", False
    ),
    "heads: the last left out": Mutant(
        BACKWARD,
        "for (int head = 0; head < problem.heads; ++head) {\n    const size_t slot",
        "head < problem.heads",
        "head < problem.heads - 1",
        "like_the_reference",
    ),
    "division: rounded down": Mutant(
        LAUNCHES,
        "(int64_t{1} << (31 + bits)) / x + 1",
        "(int64_t{1} << (31 + bits)) / x + 1",
        "(int64_t{1} << (31 + bits)) / x",
        "odd_sizes",
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
    "places read in one another's place": Mutant(
        SAMPLES,
        "data) + 2 * static_cast<long long>(pair));",
        "2 * static_cast<long long>(pair)",
        "2 * static_cast<long long>(pair ^ 1)",
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
        DETERMINISTIC,
        "upper * entry.x, lower - lower * entry.x",
        "lower - lower * entry.x",
        "lower * entry.x",
        "are_cells",
    ),
    "forward: reads of another head": Mutant(
        FORWARD, "channel = head * D + lane * kSize", "head * D", "(problem.heads - 1 - head) * D", "like_the_reference"
    ),
    "forward: all slots for the first head of the block": Mutant(
        FORWARD, "slot & ((1 << problem.heads_log2) - 1)", "(1 << problem.heads_log2) - 1", "0", "every_width"
    ),
    "backward: writes into another image": Mutant(
        BACKWARD, "sums + image + tile.head * D + lane * 4", "image", "0", "like_the_reference"
    ),
    "boxes: sides not halved": Mutant(
        SAMPLES, "const A half = static_cast<A>(0.5)", "static_cast<A>(0.5)", "static_cast<A>(1)", "like_the_reference"
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
    "tiles: lanes beyond the last sample read one": "as in forward",
    "tiles: rows beyond the border are loaded": "as in forward",
    "sort: warps beyond the last list": "lists of a level are a multiple of 32, so they fill all blocks",
    "tiles: all cells of even columns": "which half of the lanes has which column matters only for the loads",
    "tiles: keys without rows": "keys matter for the order alone, and any order gives the same sums",
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
            self_test._check(torch.ops.dino_on_cpu, torch.device("cpu"))
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
