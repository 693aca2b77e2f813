// Multi-scale deformable attention, backward, on CUDA devices.
//
// A first kernel goes from query to query: it reads what forward read and writes the gradients of locations and weights
// (of offsets, logits and reference in the fused form). The gradient of the values comes in one of two ways:
//
//   added    The first kernel adds its share to every cell it touched, by atomic additions. For few samples.
//   listed   All samples are listed by their upper left neighbour: count_samples, place_lists, then the first kernel
//            writes the lists. sum_lists adds up each list and passes four sums on to four cells. So a gradient row is
//            read once per sample and a cell is written four times, however many samples touch it (more than a thousand
//            in the coarsest level). Lists whose upper left neighbours are two rows or columns apart share no
//            cell, so four launches, one for each parity of row and column, need no atomic addition.
//
// The order of a list is that in which samples happened to arrive. sort_lists makes it the same in each run: this is
// the deterministic mode.

#pragma once

#include "deform_attn_samples.cuh"

namespace dino {

constexpr int kBackwardThreads = 128;
// At least so many blocks on a multiprocessor: up to 128 registers a thread when listed, otherwise 168; none is
// spilled.
constexpr int kListedBlocks = 4, kAddedBlocks = 3;
constexpr int kListThreads = 256;

// ---- Lists. An upper left neighbour has a row from -1 to height - 1 and a column from -1 to width - 1, so a level has
// (height + 1) * (width + 1) lists.

template <typename A>
struct alignas(4 * sizeof(A)) Entry {
  A right, down, weight;
  int query;
};

template <typename A>
struct Lists {
  int* count;  // entries of each list, (B, M, lists)
  int* end;    // where the next entry goes; behind the last entry when the list is complete
  Entry<A>* entries;
};

__device__ __forceinline__ int list_of(const Problem& problem, const Level& level, int image, int head, int x, int y) {
  return (image * problem.heads + head) * problem.lists + level.lists + (y + 1) * (level.width + 1) + x + 1;
}

template <typename A>
__device__ __forceinline__ void append(const Lists<A>& lists, int list, const Entry<A>& entry) {
  lists.entries[atomicAdd(lists.end + list, 1)] = entry;
}

template <typename A>
__global__ void count_samples(const __grid_constant__ Problem problem, int* __restrict__ count) {
  const long long total = static_cast<long long>(problem.batch) * problem.queries * problem.heads * problem.samples;
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int index = static_cast<int>(i), slot = index / problem.samples, s = index - slot * problem.samples;
  const int row = slot / problem.heads, head = slot - row * problem.heads, l = level_of(problem, s);
  const Level level = problem.level[l];
  const Sample<A> sample = locate<A>(problem, level, l, row, read_pair<A>(problem.places, index));
  if (sample.inside) atomicAdd(count + list_of(problem, level, row / problem.queries, head, sample.x, sample.y), 1);
}

// Gives each list its place. The lists of a block lie side by side; blocks follow each other as they happen to run,
// which changes where a list lies and nothing else.
__global__ void __launch_bounds__(kListThreads)
    place_lists(const int* __restrict__ count, int lists, int* __restrict__ end, int* __restrict__ used) {
  __shared__ int warp_sum[kListThreads / kWarp];
  __shared__ int block_start;
  const int i = blockIdx.x * kListThreads + threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int mine = i < lists ? count[i] : 0;
  int sum = mine;  // of the lanes up to this one
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (lane == kWarp - 1) warp_sum[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int all = 0;
    for (int w = 0; w < kListThreads / kWarp; ++w) {
      const int next = all + warp_sum[w];
      warp_sum[w] = all;
      all = next;
    }
    block_start = atomicAdd(used, all);
  }
  __syncthreads();
  if (i < lists) end[i] = block_start + warp_sum[warp] + sum - mine;
}

__device__ __forceinline__ bool less(float x, float y) { return __float_as_int(x) < __float_as_int(y); }
__device__ __forceinline__ bool less(double x, double y) { return __double_as_longlong(x) < __double_as_longlong(y); }
__device__ __forceinline__ bool same(float x, float y) { return __float_as_int(x) == __float_as_int(y); }
__device__ __forceinline__ bool same(double x, double y) {
  return __double_as_longlong(x) == __double_as_longlong(y);
}

// Any total order will do; entries that are equal in everything may lie in either order. Bits are compared, so that
// numbers which are none are ordered too.
template <typename A>
__device__ __forceinline__ bool less(const Entry<A>& a, const Entry<A>& b) {
  if (a.query != b.query) return a.query < b.query;
  if (!same(a.right, b.right)) return less(a.right, b.right);
  if (!same(a.down, b.down)) return less(a.down, b.down);
  return less(a.weight, b.weight);
}

template <typename A>
__device__ __forceinline__ void order(Entry<A>* entries, int low, int high) {
  const Entry<A> a = entries[low], b = entries[high];
  if (less(b, a)) entries[low] = b, entries[high] = a;
}

// Bitonic sort of each list by one warp, in place. Every comparison leaves the smaller entry at the lower position, so
// positions beyond the end act as if they held the largest entries, and any length is fine.
template <typename A>
__global__ void sort_lists(Lists<A> lists, int number) {
  const int list = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
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

// The lists of one parity: rows -1 + odd_rows, 1 + odd_rows, ... and columns likewise.
__host__ __device__ __forceinline__ int of_parity(int lists, int odd) { return (lists + 1 - odd) / 2; }

constexpr int kWarpsOfLists = kListThreads / kWarp;

// Lists that a warp works on, one after the other. To find out which they are takes more instructions than to sum a
// short list, so where there are plenty of lists, several share that work.
constexpr int kManyLists = 1 << 16;
__host__ __device__ __forceinline__ int lists_of_warp(long long lists_of_level) {
  return lists_of_level < kManyLists ? 1 : 4;
}

struct ListRow {
  int image, head, level, y;
  int x, end;  // the first list of the warp, and where its last one ends; the others are kListStep apart
};

constexpr int kListStep = 2 * kWarpsOfLists;

// Blocks of the coarsest level come first: its lists are the longest.
__device__ __forceinline__ ListRow lists_of_warp(const Problem& problem, int odd_rows, int odd_columns) {
  unsigned block = blockIdx.x;
  for (int l = problem.levels - 1;; --l) {
    const Level& level = problem.level[l];
    const unsigned rows = of_parity(level.height + 1, odd_rows), columns = of_parity(level.width + 1, odd_columns);
    const unsigned images_and_heads = problem.batch * problem.heads;
    const unsigned span = kWarpsOfLists * lists_of_warp(static_cast<long long>(images_and_heads) * rows * columns);
    const unsigned groups = (columns + span - 1) / span, blocks = images_and_heads * rows * groups;
    if (block >= blocks && l > 0) {
      block -= blocks;
      continue;
    }
    const unsigned first = block % groups * span, row = block / groups % rows, image_and_head = block / groups / rows;
    ListRow lists;
    lists.image = image_and_head / problem.heads, lists.head = image_and_head % problem.heads;
    lists.level = l, lists.y = 2 * row + odd_rows - 1;
    lists.x = 2 * (first + threadIdx.x / kWarp) + odd_columns - 1;
    lists.end = 2 * min(first + span, columns) + odd_columns - 1;
    return lists;
  }
}

// First token of neighbour `corner`, or -1 beyond the border.
__device__ __forceinline__ int token_of(const Level& level, const ListRow& list, int corner) {
  const int x = list.x + (corner & 1), y = list.y + (corner >> 1);
  return x < 0 || y < 0 || x >= level.width || y >= level.height ? -1 : level.start + y * level.width + x;
}

// Halves a list of numbers among lanes: every step keeps one half and gives the other to the partner `bit` lanes away.
// After the last, the numbers of all partners are summed, each lane holding another part.
template <int SIZE, int BIT, int LAST>
__device__ __forceinline__ void share_out(float* x, int lane) {
  if constexpr (BIT >= LAST) {
    const bool upper = lane & BIT;
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) {
      const float keep = upper ? x[i + SIZE / 2] : x[i], give = upper ? x[i] : x[i + SIZE / 2];
      x[i] = keep + __shfl_xor_sync(kAllLanes, give, BIT);
    }
    share_out<SIZE / 2, BIT / 2, LAST>(x, lane);
  }
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

// A warp for a list; kLanes lanes read one gradient row, so kWarp / kLanes entries are worked on at a time.
template <typename T, int D>
__global__ void __launch_bounds__(kListThreads)
    sum_lists_packets(const __grid_constant__ Problem problem, const T* __restrict__ grad, Lists<float> lists,
                      float* sums, T* result, int odd_rows, int odd_columns) {
  constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kEntries = kWarp / kLanes;
  constexpr int kMine = 4 * kSize / kEntries;  // numbers that a lane is left with, of [corner][channel of the packet]
  ListRow mine = lists_of_warp(problem, odd_rows, odd_columns);
  const Level level = problem.level[mine.level];
  const bool first = !odd_rows && !odd_columns, last = odd_rows && odd_columns;
  const int lane = threadIdx.x % kWarp, packet = lane % kLanes, stride = problem.heads * D;
  const size_t image = static_cast<size_t>(mine.image) * problem.queries * stride;
  const T* rows = settled(grad + image + mine.head * D + packet * kSize);

  for (; mine.x < mine.end; mine.x += kListStep) {
    const int list = list_of(problem, level, mine.image, mine.head, mine.x, mine.y);
    const int size = lists.count[list], end = lists.end[list];
    if (size == 0 && !first && !(last && sizeof(T) < sizeof(float))) continue;
    float sum[4 * kSize] = {};
#pragma unroll 2
    for (int i = end - size + lane / kLanes; i < end; i += kEntries) {
      const float4 entry = __ldg(reinterpret_cast<const float4*>(lists.entries + i));
      float g[kSize];
      Packet<T>::load(rows + __float_as_int(entry.w) * stride, g);
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
  ListRow mine = lists_of_warp(problem, odd_rows, odd_columns);
  const Level level = problem.level[mine.level];
  const bool first = !odd_rows && !odd_columns;
  const int stride = problem.heads * problem.dim;
  for (; mine.x < mine.end; mine.x += kListStep) {
    const int list = list_of(problem, level, mine.image, mine.head, mine.x, mine.y);
    const int size = lists.count[list], end = lists.end[list];
    for (int channel = threadIdx.x % kWarp; channel < problem.dim; channel += kWarp) {
      A sum[4] = {};
      for (int i = end - size; i < end; ++i) {
        const Entry<A> entry = lists.entries[i];
        const int row = mine.image * problem.queries + entry.query;
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

// ---- From query to query

template <typename A>
struct Gradients {
  Numbers places, weights;
  A* reference;  // fused form: (B, Q, M, L, 4), before the sum over heads: d/dx, d/dy, then times the offset in x, in y
  A* scratch;    // fused form of backward_any: (B, Q, M, L * P)
};

// Gradients of one sample from the products `dot` of the gradient row with the four neighbours.
template <typename A>
struct SampleGradient {
  A weight, x, y;  // x and y in cells

  __device__ __forceinline__ SampleGradient(const Sample<A>& s, const Level& level, A share, const A (&dot)[4]) {
    // Selected, not multiplied by zero: what stands at a neighbour beyond the border is of no meaning.
    const bool left = s.has_left(), right = s.has_right(level), top = s.has_top(), bottom = s.has_bottom(level);
    const A d0 = s.inside && left && top ? dot[0] : 0, d1 = s.inside && right && top ? dot[1] : 0;
    const A d2 = s.inside && left && bottom ? dot[2] : 0, d3 = s.inside && right && bottom ? dot[3] : 0;
    const A rightwards_above = d1 - d0, rightwards_below = d3 - d2;
    const A above = d0 + s.right * rightwards_above, below = d2 + s.right * rightwards_below;
    weight = s.inside ? above + s.down * (below - above) : 0;
    x = s.inside ? share * (rightwards_above + s.down * (rightwards_below - rightwards_above)) : 0;
    y = s.inside ? share * (below - above) : 0;
  }
};

// result[index] += x, 16 bytes in one reduction where the architecture has it
__device__ __forceinline__ void add_atomically(float* to, float4 x) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(to), x);
#else
  atomicAdd(to, x.x), atomicAdd(to + 1, x.y), atomicAdd(to + 2, x.z), atomicAdd(to + 3, x.w);
#endif
}

// What all samples of a slot have in common, for one lane of backward_packets.
template <typename T, int D>
struct Row {
  static constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kParts = kSize / 4;
  const T* value;   // of the image, at this lane's channels
  float* sums;      // the same in `sums`, at the first channel of the head plus 4 * lane
  float grad[kSize];     // at this lane's channels
  float4 spread[kParts];  // at channels 4 * lane + k * 4 * kLanes: lanes next to each other add next to each other
  const int4* offsets;
  const float4* parts;
  int lane;
};

// Products of the gradient row with the neighbours of COUNT samples, 1, 2 or 4. Each lane can only sum its own
// channels; the sums over lanes are formed while samples are merged two by two, so that lane i ends with the products
// of sample i % COUNT.
template <int COUNT, bool LISTED, typename T, int D>
__device__ __forceinline__ void products(const Row<T, D>& row, int sample, float (&dot)[4]) {
  if constexpr (COUNT > 1) {
    float other[4];
    products<COUNT / 2, LISTED>(row, sample, dot);
    products<COUNT / 2, LISTED>(row, sample + COUNT / 2, other);
    const bool upper = row.lane & (COUNT / 2);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float keep = upper ? other[c] : dot[c], give = upper ? dot[c] : other[c];
      dot[c] = keep + __shfl_xor_sync(kAllLanes, give, COUNT / 2);
    }
  } else {
    const int4 offset = row.offsets[sample];
    const int from[4] = {offset.x, offset.y, offset.z, offset.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[Row<T, D>::kSize];
      Packet<T>::load(row.value + from[c], x);
      dot[c] = 0;
#pragma unroll
      for (int v = 0; v < Row<T, D>::kSize; ++v) dot[c] = fmaf(row.grad[v], x[v], dot[c]);
    }
    if constexpr (!LISTED) {
      const float4 part = row.parts[sample];
      const float share[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (share[c] == 0) continue;
#pragma unroll
        for (int k = 0; k < Row<T, D>::kParts; ++k) {
          const float4 g = row.spread[k];
          add_atomically(row.sums + from[c] + k * 4 * Row<T, D>::kLanes,
                         make_float4(share[c] * g.x, share[c] * g.y, share[c] * g.z, share[c] * g.w));
        }
      }
    }
  }
}

// The second half of the fused form, once all samples of a slot are known: kept[s] = weight, its gradient, d/dx, d/dy.
template <int LANES>
__device__ __forceinline__ void finish_slot(const Problem& problem, const Gradients<float>& gradients,
                                            const float4* kept, int slot, int lane, float weighted) {
  const int first = slot * problem.samples;
  for (int s = lane; s < problem.samples; s += LANES) {
    write<float>(gradients.weights, first + s, kept[s].x * (kept[s].y - weighted));
  }
  for (int l = lane; l < problem.levels; l += LANES) {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int s = l * problem.points; s < (l + 1) * problem.points; ++s) {
      const Pair<float> offset = read_pair<float>(problem.places, first + s);
      sum.x += kept[s].z, sum.y += kept[s].w;
      sum.z = fmaf(kept[s].z, offset.x, sum.z), sum.w = fmaf(kept[s].w, offset.y, sum.w);
    }
    reinterpret_cast<float4*>(gradients.reference)[slot * problem.levels + l] = sum;
  }
}

// As forward_packets, with a group of samples at a time: lane i of a slot prepares sample i, all lanes read the
// neighbours of all samples, and lane i ends with what it needs for the gradients of sample i.
template <typename T, int D, bool FUSED, bool LISTED>
__global__ void __launch_bounds__(kBackwardThreads, LISTED ? kListedBlocks : kAddedBlocks)
    backward_packets(const __grid_constant__ Problem problem, const T* __restrict__ grad, const T* __restrict__ value,
                     const __grid_constant__ Gradients<float> gradients, float* sums, Lists<float> lists) {
  constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kSlots = kBackwardThreads / kLanes;
  __shared__ int4 offsets[kSlots][kLanes + 1];
  __shared__ float4 parts[LISTED ? 1 : kSlots][kLanes + 1];
  extern __shared__ float4 kept_by_slots[];  // FUSED: (kSlots, L * P)
  const int slot_of_block = threadIdx.x / kLanes;
  const Tile tile = tile_of_block(problem);
  const int stride = problem.heads * D, tile_size = 1 << (problem.tile_columns_log2 + problem.tile_rows_log2);
  const size_t image = static_cast<size_t>(tile.image) * problem.tokens * stride;

  Row<T, D> row;
  const int lane = row.lane = threadIdx.x % kLanes;
  row.value = settled(value + image + tile.head * D + lane * kSize);
  // Not settled: reductions need a pointer that is known to be global.
  row.sums = LISTED ? nullptr : sums + image + tile.head * D + lane * 4;
  row.offsets = offsets[slot_of_block];
  row.parts = parts[LISTED ? 0 : slot_of_block];
  float4* const kept = kept_by_slots + slot_of_block * problem.samples;

  for (int i = slot_of_block; i < tile_size; i += kSlots) {
    const int query = query_of_tile(problem, tile, i);
    const bool active = query >= 0;
    const int query_row = tile.image * problem.queries + query, slot = query_row * problem.heads + tile.head;
    const int first = slot * problem.samples;
    const T* grad_row = grad + static_cast<size_t>(active ? slot : 0) * D;
    Packet<T>::load(grad_row + lane * kSize, row.grad);
    if constexpr (!LISTED) {
#pragma unroll
      for (int k = 0; k < Row<T, D>::kParts; ++k) {
        const T* from = grad_row + 4 * (lane + k * kLanes);
        row.spread[k] = make_float4(widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3]));
      }
    }
    Softmax<float> soft;
    if constexpr (FUSED) soft = softmax<kLanes, float>(problem, first, lane, active);
    float weighted = 0;  // FUSED: sum of weight * its gradient, over this lane's samples

    for (int group = 0; group < problem.samples; group += kLanes) {
      const int s = group + lane;
      const bool mine = active && s < problem.samples;
      Sample<float> sample;
      Level level;
      float weight = 0;
      int l = 0;
      int4 offset = make_int4(0, 0, 0, 0);
      float part[4] = {};
      sample.inside = false;
      if (mine) {
        l = level_of(problem, s);
        level = problem.level[l];
        const Pair<float> place = read_pair<float>(problem.places, first + s);
        weight = read<float>(problem.weights, first + s);
        sample = locate<float>(problem, level, l, query_row, place);
        if constexpr (FUSED) weight = exponential(weight - soft.top) * soft.scale;
        if (sample.inside) {
          offset = neighbours(sample, level, stride);
          if constexpr (LISTED) {
            append(lists, list_of(problem, level, tile.image, tile.head, sample.x, sample.y),
                   Entry<float>{sample.right, sample.down, weight, query});
          } else {
            shares(sample, level, weight, part);
          }
        }
      }
      __syncwarp();  // the group before has been read
      offsets[slot_of_block][lane] = offset;
      if constexpr (!LISTED) parts[slot_of_block][lane] = make_float4(part[0], part[1], part[2], part[3]);
      __syncwarp();
      float dot[4];
#pragma unroll 1
      for (int four = 0; four < kLanes; four += 4) {  // unrolled, this loop would take too many registers
        float some[4];
        products<4, LISTED>(row, four, some);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int bit = 4; bit < kLanes; bit *= 2) some[c] += __shfl_xor_sync(kAllLanes, some[c], bit);
          if (lane / 4 * 4 == four) dot[c] = some[c];
        }
      }
      if (mine) {
        const SampleGradient<float> gradient(sample, level, weight, dot);
        write_pair<float>(gradients.places, first + s, gradient.x * sample.unit_x, gradient.y * sample.unit_y);
        if constexpr (FUSED) {
          kept[s] = make_float4(weight, gradient.weight, gradient.x * level.width, gradient.y * level.height);
          weighted = fmaf(weight, gradient.weight, weighted);
        } else {
          write<float>(gradients.weights, first + s, gradient.weight);
        }
      }
    }
    if constexpr (FUSED) {
      weighted = sum_lanes<kLanes>(weighted);
      __syncwarp();  // kept is complete
      if (active) finish_slot<kLanes>(problem, gradients, kept, slot, lane, weighted);
      __syncwarp();  // and has been read
    }
  }
}

// Any head dimension, any type: a warp for each query and head, a lane for each channel. `sums` is null when listed.
template <typename T>
__global__ void backward_any(const __grid_constant__ Problem problem, const T* __restrict__ grad,
                             const T* __restrict__ value,
                             const __grid_constant__ Gradients<typename Accumulator<T>::type> gradients,
                             typename Accumulator<T>::type* sums, Lists<typename Accumulator<T>::type> lists) {
  using A = typename Accumulator<T>::type;
  const int lane = threadIdx.x % kWarp;
  const long long slot = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;  // (row, head)
  if (slot >= static_cast<long long>(problem.batch) * problem.queries * problem.heads) return;
  const int head = slot % problem.heads, row = slot / problem.heads, image = row / problem.queries;
  const int first = slot * problem.samples, stride = problem.heads * problem.dim;
  const size_t start = static_cast<size_t>(image) * problem.tokens * stride + head * problem.dim;
  Softmax<A> soft;
  if (problem.box) soft = softmax<kWarp, A>(problem, first, lane, true);
  A weighted = 0, reference[4] = {};  // fused form: sum of weight * its gradient; d/dreference of one level
  for (int s = 0; s < problem.samples; ++s) {
    const int l = level_of(problem, s);
    const Level& level = problem.level[l];
    const Pair<A> place = read_pair<A>(problem.places, first + s);
    const Sample<A> sample = locate<A>(problem, level, l, row, place);
    A weight = read<A>(problem.weights, first + s), dot[4] = {};
    if (problem.box) weight = exponential(weight - soft.top) * soft.scale;
    if (sample.inside) {  // the same in all lanes
      A part[4];
      const int4 offset = neighbours(sample, level, stride);
      const int from[4] = {offset.x, offset.y, offset.z, offset.w};
      shares(sample, level, weight, part);
      for (int channel = lane; channel < problem.dim; channel += kWarp) {
        const A g = widen(grad[slot * problem.dim + channel]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          dot[c] += g * widen(value[start + from[c] + channel]);
          if (sums && part[c] != 0) atomicAdd(sums + start + from[c] + channel, part[c] * g);
        }
      }
      if (!sums && lane == 0) {
        append(lists, list_of(problem, level, image, head, sample.x, sample.y),
               Entry<A>{sample.right, sample.down, weight, row - image * problem.queries});
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) dot[c] = sum_lanes<kWarp>(dot[c]);
    const SampleGradient<A> gradient(sample, level, weight, dot);
    if (lane == 0) {
      write_pair<A>(gradients.places, first + s, gradient.x * sample.unit_x, gradient.y * sample.unit_y);
      if (!problem.box) write<A>(gradients.weights, first + s, gradient.weight);
    }
    if (problem.box) {
      if (lane == 0) gradients.scratch[first + s] = gradient.weight;
      weighted += weight * gradient.weight;
      const A x = gradient.x * level.width, y = gradient.y * level.height;
      reference[0] += x, reference[1] += y;
      reference[2] += x * place.x, reference[3] += y * place.y;
      if (s + 1 == (l + 1) * problem.points) {
        if (lane < 4) {
          const A mine = lane == 0 ? reference[0] : lane == 1 ? reference[1] : lane == 2 ? reference[2] : reference[3];
          gradients.reference[(static_cast<size_t>(slot) * problem.levels + l) * 4 + lane] = mine;
        }
        reference[0] = reference[1] = reference[2] = reference[3] = 0;
      }
    }
  }
  if (!problem.box) return;
  __syncwarp();  // scratch is complete
  for (int s = lane; s < problem.samples; s += kWarp) {
    const A weight = exponential(read<A>(problem.weights, first + s) - soft.top) * soft.scale;
    write<A>(gradients.weights, first + s, weight * (gradients.scratch[first + s] - weighted));
  }
}

// Gradient of the reference: the sum over heads, a thread for each number.
template <typename A>
__global__ void sum_heads(const __grid_constant__ Problem problem, const A* __restrict__ by_heads, Numbers reference) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<long long>(problem.batch) * problem.queries * problem.levels * problem.box) return;
  const int coordinate = i % problem.box, l = i / problem.box % problem.levels, row = i / problem.box / problem.levels;
  A sum = 0;
  for (int head = 0; head < problem.heads; ++head) {
    const size_t slot = static_cast<size_t>(row) * problem.heads + head;
    sum += by_heads[(slot * problem.levels + l) * 4 + coordinate];
  }
  if (coordinate > 1) sum *= static_cast<A>(0.5) / static_cast<A>(problem.points);
  write<A>(reference, static_cast<int>(i), sum);
}

}  // namespace dino
