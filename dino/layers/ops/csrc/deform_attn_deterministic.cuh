// The gradient of the values, the same to the last bit in each run, for the backward pass on CUDA devices.
//
//   sort_lists   puts each list into an order that does not depend on which sample came first
//   sum_lists    adds up the entries of each cell and passes four sums on to four tokens. Cells that are two rows or
//                columns apart share no token, so four launches, one for each parity of row and column, need no atomic
//                addition

#pragma once

#include "deform_attn_lists.cuh"

namespace dino {

template <typename A>
__device__ __forceinline__ void order(Entry<A>* entries, int low, int high) {
  const Entry<A> a = entries[low], b = entries[high];
  if (b.sample < a.sample) entries[low] = b, entries[high] = a;
}

// Bitonic sort of each list by one warp, in place. Every comparison leaves the smaller entry at the lower position, so
// positions beyond the end act as if they held the largest entries, and any length is fine.
template <typename A>
__global__ void sort_lists(Lists<A> lists, int number) {
  const long long list = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (list >= number) return;
  const int size = lists.count[list];
  Entry<A>* entries = lists.entries + (lists.end[list] - size);
  for (int log = 0; 1 << log < size; ++log) {  // sorted runs of 2^log become runs of 2^(log + 1)
    const int run = 1 << log;
    for (int i = lane;; i += kWarp) {
      const int place = i & (run - 1), low = ((i >> log) << (log + 1)) + place, high = low + 2 * (run - 1 - place) + 1;
      if (low >= size) break;
      if (high < size) order(entries, low, high);
    }
    __syncwarp();
    for (int step = log - 1; step >= 0; --step) {
      for (int i = lane;; i += kWarp) {
        const int low = ((i >> step) << (step + 1)) + (i & ((1 << step) - 1)), high = low + (1 << step);
        if (low >= size) break;
        if (high < size) order(entries, low, high);
      }
      __syncwarp();
    }
  }
}

// The cells of one parity: rows -1 + odd_rows, 1 + odd_rows, ... and columns likewise.
__host__ __device__ __forceinline__ int of_parity(int cells, int odd) { return (cells + 1 - odd) / 2; }

constexpr int kWarpsOfLists = kListThreads / kWarp;

// Cells that a warp works on, one after the other. To find out which they are takes more instructions than to sum a
// few entries, so where there are plenty of cells, several share that work.
constexpr int kManyCells = 1 << 16;
__host__ __device__ __forceinline__ int cells_of_warp(long long cells_of_level) {
  return cells_of_level < kManyCells ? 1 : 4;
}

struct CellRow {
  int image, head, level, y;
  int x, end;  // the first cell of the warp, and where its last one ends; the others are kCellStep apart
};

constexpr int kCellStep = 2 * kWarpsOfLists;

// Blocks of the coarsest level come first: its cells have the most entries.
__device__ __forceinline__ CellRow cells_of_warp(const Problem& problem, int odd_rows, int odd_columns) {
  unsigned block = blockIdx.x;
  for (int l = problem.levels - 1;; --l) {
    const Level& level = problem.level[l];
    const unsigned rows = of_parity(level.height + 1, odd_rows), columns = of_parity(level.width + 1, odd_columns);
    const unsigned images_and_heads = problem.batch * problem.heads;
    const unsigned span = kWarpsOfLists * cells_of_warp(static_cast<long long>(images_and_heads) * rows * columns);
    const unsigned groups = (columns + span - 1) / span, blocks = images_and_heads * rows * groups;
    if (block >= blocks && l > 0) {
      block -= blocks;
      continue;
    }
    const unsigned first = block % groups * span, row = block / groups % rows, image_and_head = block / groups / rows;
    CellRow cells;
    cells.image = image_and_head / problem.heads, cells.head = image_and_head % problem.heads;
    cells.level = l, cells.y = 2 * row + odd_rows - 1;
    cells.x = 2 * (first + threadIdx.x / kWarp) + odd_columns - 1;
    cells.end = 2 * min(first + span, columns) + odd_columns - 1;
    return cells;
  }
}

// First token of neighbour `corner`, or -1 beyond the border.
__device__ __forceinline__ int token_of(const Level& level, const CellRow& cell, int corner) {
  const int x = cell.x + (corner & 1), y = cell.y + (corner >> 1);
  return x < 0 || y < 0 || x >= level.width || y >= level.height ? -1 : level.start + y * level.width + x;
}

struct Range {
  int begin, end;
};

// The entries of a cell: its lists lie side by side.
template <typename A>
__device__ __forceinline__ Range entries_of(const Problem& problem, const Lists<A>& lists, const Level& level,
                                            const CellRow& cell) {
  const int list = list_of(problem, level, cell.image, cell.head, 0, cell.x, cell.y);
  return {lists.end[list] - lists.count[list], lists.end[list + (1 << level.copies_log2) - 1]};
}

// Four channels of the sum so far, which is float even where the result is of a half type. The first of the four
// launches finds nothing there, the last one writes the result.
template <typename T>
__device__ __forceinline__ void add_part(float* sums, T* result, int index, const float* part, bool first, bool last) {
  float4 sum = make_float4(part[0], part[1], part[2], part[3]);
  if (!first) {
    const float4 before = *reinterpret_cast<const float4*>(sums + index);
    sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
  }
  if (sizeof(T) == sizeof(float) || !last) {
    *reinterpret_cast<float4*>(sums + index) = sum;
  } else {
    alignas(8) T x[4] = {narrow<T>(sum.x), narrow<T>(sum.y), narrow<T>(sum.z), narrow<T>(sum.w)};
    *reinterpret_cast<uint2*>(result + index) = *reinterpret_cast<const uint2*>(x);
  }
}

// A warp for a cell; kLanes lanes read one gradient row, so kWarp / kLanes entries are worked on at a time.
template <typename T, int D>
__global__ void __launch_bounds__(kListThreads)
    sum_lists_packets(const __grid_constant__ Problem problem, const T* __restrict__ grad, Lists<float> lists,
                      float* sums, T* result, int odd_rows, int odd_columns) {
  constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kEntries = kWarp / kLanes;
  constexpr int kMine = 4 * kSize / kEntries;  // numbers that a lane is left with, of [corner][channel of the packet]
  CellRow mine = cells_of_warp(problem, odd_rows, odd_columns);
  const Level level = problem.level[mine.level];
  const bool first = !odd_rows && !odd_columns, last = odd_rows && odd_columns;
  const int lane = threadIdx.x % kWarp, packet = lane % kLanes, stride = problem.heads * D;
  const size_t image = static_cast<size_t>(mine.image) * problem.queries * stride;
  const T* rows = settled(grad + image + mine.head * D + packet * kSize);

  for (; mine.x < mine.end; mine.x += kCellStep) {
    const Range entries = entries_of(problem, lists, level, mine);
    if (entries.begin == entries.end && !first && !(last && sizeof(T) < sizeof(float))) continue;
    float sum[4 * kSize] = {};
#pragma unroll 2
    for (int i = entries.begin + lane / kLanes; i < entries.end; i += kEntries) {
      const float4 entry = __ldg(reinterpret_cast<const float4*>(lists.entries + i));
      float g[kSize];
      Packet<T>::load(rows + divide(__float_as_int(entry.w), problem.by_samples) * stride, g);
      const float lower = entry.y * entry.z, upper = entry.z - lower;
      const float part[4] = {upper - upper * entry.x, upper * entry.x, lower - lower * entry.x, lower * entry.x};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int v = 0; v < kSize; ++v) sum[c * kSize + v] = fmaf(part[c], g[v], sum[c * kSize + v]);
      }
    }
    __syncwarp();  // lanes may have had different numbers of entries
    share_out<4 * kSize, kWarp / 2, kLanes>(sum, lane);
#pragma unroll
    for (int i = 0; i < kMine; i += 4) {
      const int number = lane / kLanes * kMine + i, token = token_of(level, mine, number / kSize);
      if (token < 0) continue;
      const int row = (mine.image * problem.tokens + token) * stride + mine.head * D;
      add_part(sums, result, row + packet * kSize + number % kSize, sum + i, first, last);
    }
  }
}

// Any head dimension, any type: a lane for each channel. `sums` becomes the gradient.
template <typename T>
__global__ void __launch_bounds__(kListThreads)
    sum_lists_any(const __grid_constant__ Problem problem, const T* __restrict__ grad,
                  Lists<typename Accumulator<T>::type> lists, typename Accumulator<T>::type* sums, int odd_rows,
                  int odd_columns) {
  using A = typename Accumulator<T>::type;
  CellRow mine = cells_of_warp(problem, odd_rows, odd_columns);
  const Level level = problem.level[mine.level];
  const bool first = !odd_rows && !odd_columns;
  const int stride = problem.heads * problem.dim;
  for (; mine.x < mine.end; mine.x += kCellStep) {
    const Range entries = entries_of(problem, lists, level, mine);
    for (int channel = threadIdx.x % kWarp; channel < problem.dim; channel += kWarp) {
      A sum[4] = {};
      for (int i = entries.begin; i < entries.end; ++i) {
        const Entry<A> entry = lists.entries[i];
        const int row = mine.image * problem.queries + divide(entry.sample, problem.by_samples);
        const A g = widen(grad[static_cast<size_t>(row) * stride + mine.head * problem.dim + channel]) * entry.weight;
        sum[0] += g * (1 - entry.down) * (1 - entry.right), sum[1] += g * (1 - entry.down) * entry.right;
        sum[2] += g * entry.down * (1 - entry.right), sum[3] += g * entry.down * entry.right;
      }
      for (int c = 0; c < 4; ++c) {
        const int token = token_of(level, mine, c);
        if (token < 0) continue;
        const int row = mine.image * problem.tokens + token;
        A* to = sums + static_cast<size_t>(row) * stride + mine.head * problem.dim + channel;
        *to = first ? sum[c] : *to + sum[c];
      }
    }
  }
}

}  // namespace dino
