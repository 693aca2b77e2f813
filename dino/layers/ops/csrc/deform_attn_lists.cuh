// Lists of samples by the cell that they lie in, for the backward pass on CUDA devices.
//
//   rank_samples    counts the samples of each list, and notes the place of each sample in its list
//   place_lists     gives each list its place among the entries
//   write_entries   writes the entry of each sample to its place
//
// A cell of a coarse level gets hundreds of samples. Counting them in one place would make its memory the slowest part
// of all, so such a cell has several lists, which lie side by side, and each sample picks one by its query.

#pragma once

#include "deform_attn_samples.cuh"

namespace dino {

constexpr int kListThreads = 256;

// The cell of a sample is that of its upper left neighbour, which has a row from -1 to height - 1 and a column from -1
// to width - 1: a level has (height + 1) * (width + 1) cells.

// The lists of a level begin at a multiple of this number, so those of a cell are in one block of place_lists.
constexpr int kMaxCopies = 32;

template <typename A>
struct alignas(4 * sizeof(A)) Entry {
  A right, down, weight;
  int sample;  // query * samples + sample of this query, within its image and head
};

template <typename A>
struct Lists {
  int* count;  // samples of each list, (B, M, lists)
  int* end;    // after the last entry of each list
  int* used;   // entries placed so far
  int* rank;   // of each sample in its list, (B, Q, M, L, P); -1 outside the image
  Entry<A>* entries;
};

// Number of the first list of a level, for one head of one image.
__device__ __forceinline__ int first_list(const Problem& problem, const Level& level, int image, int head) {
  return (image * problem.heads + head) * problem.lists + level.lists;
}

__device__ __forceinline__ int list_of(const Problem& problem, const Level& level, int image, int head, int query,
                                       int x, int y) {
  const int cell = (y + 1) * (level.width + 1) + x + 1, copy = query & ((1 << level.copies_log2) - 1);
  return first_list(problem, level, image, head) + (cell << level.copies_log2) + copy;
}

constexpr int kRankedByThread = 4;  // that many additions of a thread are under way at a time

template <typename A>
__global__ void __launch_bounds__(kListThreads) rank_samples(const __grid_constant__ Problem problem, Lists<A> lists) {
  const long long total = static_cast<long long>(problem.batch) * problem.queries * problem.heads * problem.samples;
  const long long first = static_cast<long long>(blockIdx.x) * (kListThreads * kRankedByThread) + threadIdx.x;
  int list[kRankedByThread];
#pragma unroll
  for (int k = 0; k < kRankedByThread; ++k) {
    const long long i = first + k * kListThreads;
    list[k] = -1;
    if (i >= total) continue;
    const int index = static_cast<int>(i), number = divide(index, problem.by_samples);
    const Slot slot(problem, number);
    const int l = level_of(problem, index - number * problem.samples);
    const Level level = problem.level[l];
    const Sample<A> sample = locate<A>(problem, level, l, slot.row, read_pair<A>(problem.places, index));
    if (sample.inside) list[k] = list_of(problem, level, slot.image, slot.head, slot.query, sample.x, sample.y);
  }
  int rank[kRankedByThread];
#pragma unroll
  for (int k = 0; k < kRankedByThread; ++k) rank[k] = list[k] < 0 ? -1 : atomicAdd(lists.count + list[k], 1);
#pragma unroll
  for (int k = 0; k < kRankedByThread; ++k) {
    const long long i = first + k * kListThreads;
    if (i < total) lists.rank[i] = rank[k];
  }
}

// The lists of a block lie side by side, in their order; blocks follow each other as they happen to run, which changes
// where a list lies and nothing else.
template <typename A>
__global__ void __launch_bounds__(kListThreads) place_lists(Lists<A> lists, int number) {
  __shared__ int warp_sum[kListThreads / kWarp];
  __shared__ int first_entry;
  const long long i = static_cast<long long>(blockIdx.x) * kListThreads + threadIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int mine = i < number ? lists.count[i] : 0;
  const int sum = sum_up_to(mine, lane);
  if (lane == kWarp - 1) warp_sum[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int all = 0;
    for (int w = 0; w < kListThreads / kWarp; ++w) {
      const int next = all + warp_sum[w];
      warp_sum[w] = all;
      all = next;
    }
    first_entry = atomicAdd(lists.used, all);
  }
  __syncthreads();
  if (i < number) lists.end[i] = first_entry + warp_sum[warp] + sum;
}

template <typename A>
__global__ void __launch_bounds__(kListThreads)
    write_entries(const __grid_constant__ Problem problem, Lists<A> lists) {
  const int lane = threadIdx.x % kSlotLanes;
  const long long number = (static_cast<long long>(blockIdx.x) * kListThreads + threadIdx.x) / kSlotLanes;
  const bool active = number < static_cast<long long>(problem.batch) * problem.queries * problem.heads;
  const Slot slot(problem, active ? static_cast<int>(number) : 0);
  const int first = active ? static_cast<int>(number) * problem.samples : 0;
  Softmax<A> soft;
  if (problem.box) soft = softmax<kSlotLanes, A>(problem, first, lane, active);
  if (!active) return;
  for (int s = lane; s < problem.samples; s += kSlotLanes) {
    const int l = level_of(problem, s), rank = lists.rank[first + s];
    const Level level = problem.level[l];
    const Sample<A> sample = locate<A>(problem, level, l, slot.row, read_pair<A>(problem.places, first + s));
    A weight = read<A>(problem.weights, first + s);
    if (problem.box) weight = exponential(weight - soft.top) * soft.scale;
    if (rank < 0) continue;
    const int list = list_of(problem, level, slot.image, slot.head, slot.query, sample.x, sample.y);
    const Entry<A> entry{sample.right, sample.down, weight, slot.query * problem.samples + s};
    lists.entries[lists.end[list] - 1 - rank] = entry;
  }
}

}  // namespace dino
