// The backward pass from cell to cell of a tile of queries, on CUDA devices: where queries are the cells of the pyramid.
//
// Queries next to each other read the same tokens, so a block sorts the samples of its tile by the cell that they lie
// in, and goes from cell to cell. All samples of a cell read the same four tokens: these are loaded once, and their
// gradients are summed up in registers. The cell to the right has two of these tokens: it takes them over. So both
// loads and atomic additions are a fraction of what they would be sample by sample.
//
// The order need not be perfect. Cells are sorted by a key of a few bits, in which cells far from each other may agree;
// where the cell changes, the sums are written and the next tokens are loaded, however often that happens.

#pragma once

#include "deform_attn_samples.cuh"

namespace dino {

constexpr int kTileThreads = 256, kTileBlocks = 3;  // as many blocks on a multiprocessor as its memory holds
constexpr int kSamplesAtATime = 2;                  // whose products are summed over the lanes together
constexpr int kKeys = 4096;             // 32 x 32 cells of four levels
constexpr int kMostTileSamples = 4096;  // a sample's number in the tile has 12 bits

// Which neighbours of a sample lie in the image.
constexpr unsigned kHasLeft = 1, kHasRight = 2, kHasTop = 4, kHasBottom = 8;

__device__ __forceinline__ int key_of(int level, int x, int y) {
  return ((level << 10) | (y & 31) << 5 | (x & 31)) & (kKeys - 1);
}

// Where a key's number is. Threads that work on 16 keys each find them in different banks.
__device__ __forceinline__ int place_of(int key) { return key + (key >> 4); }

constexpr int kKeyNumbers = kKeys + kKeys / 16, kTileWarps = kTileThreads / kWarp;

// What `order` says of a sample: its number in the tile, 12 bits; its neighbours, 4; whether its left column is odd, 1;
// its level, 8; its query in the tile, 7.
constexpr int kNumber = 0xfff, kNeighboursAt = 12, kOddAt = 16, kLevelAt = 17, kQueryAt = 25;
static_assert(kMaxLevels <= 1 << (kQueryAt - kLevelAt), "a level has 8 bits");

// Shared memory of backward_tiles. All of it is dynamic, so tile_bytes can be compared with what a device has. A sample of
// the tile is {right, down, weight, token of its cell} until its cell has been visited, then {weight, d/dweight, d/dx,
// d/dy} with x and y in cells.
struct TileMemory {
  float4* samples;     // (queries, L * P)
  unsigned* order;     // (queries * L * P), sorted: see below
  int* keys;           // (kKeyNumbers): samples of each key, then where its first one goes
  int* warp_sum;       // (kTileWarps): for the sums over keys
  unsigned* places;    // (queries * L * P): rank | key << 12 | neighbours << 24 | odd column << 28 | inside << 29
  void* rows;          // (queries, D): gradients of the output, in the place of `places`
};

__host__ __device__ inline size_t tile_bytes(int queries, int samples, int row_bytes) {
  const size_t all = static_cast<size_t>(queries) * samples, rows = static_cast<size_t>(queries) * row_bytes;
  const size_t keys = (kKeyNumbers + kTileWarps) * sizeof(int), places = all * sizeof(int);
  return all * (sizeof(float4) + sizeof(int)) + keys + (rows > places ? rows : places);
}

__device__ __forceinline__ TileMemory tile_memory(float4* memory, int all) {
  TileMemory tile;
  tile.samples = memory;
  tile.order = reinterpret_cast<unsigned*>(memory + all);
  tile.keys = reinterpret_cast<int*>(tile.order + all);
  tile.warp_sum = tile.keys + kKeyNumbers;
  tile.places = reinterpret_cast<unsigned*>(tile.warp_sum + kTileWarps);
  tile.rows = tile.places;
  return tile;
}

// Notes where a sample of the tile lies, and counts it.
__device__ __forceinline__ void keep_sample(const Problem& problem, const TileMemory& memory, int number, int s, int row,
                                            Pair<float> place, float weight) {
  const int l = level_of(problem, s);
  const Level level = problem.level[l];
  const Sample<float> sample = locate<float>(problem, level, l, row, place);
  unsigned noted = 0;
  float4 kept = make_float4(weight, 0, 0, 0);
  if (sample.inside) {
    const unsigned neighbours = (sample.has_left() ? kHasLeft : 0) | (sample.has_right(level) ? kHasRight : 0) |
                                (sample.has_top() ? kHasTop : 0) | (sample.has_bottom(level) ? kHasBottom : 0);
    const int key = key_of(l, sample.x, sample.y);
    noted = atomicAdd(memory.keys + place_of(key), 1) | key << 12 | (neighbours | (sample.x & 1) << 4 | 32u) << 24;
    const int token = level.start + max(sample.y, 0) * level.width + sample.x;
    kept = make_float4(sample.right, sample.down, weight, __int_as_float(token));
  }
  memory.samples[number] = kept;
  memory.places[number] = noted;
}

// Locates the samples of the tile. Where a query has at most one sample for each lane, a few queries at a time, so that
// their loads are under way together.
template <bool FUSED, typename Access>
__device__ __forceinline__ void locate_tile(const Problem& problem, const Tile& tile, const TileMemory& memory,
                                            int queries) {
  constexpr int kTogether = 4, kStep = kTileThreads / kSlotLanes;
  const int lane = threadIdx.x % kSlotLanes;
  for (int from = threadIdx.x / kSlotLanes; from < queries; from += kTogether * kStep) {
    int row[kTogether];
    Pair<float> place[kTogether];
    float weight[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = from + k * kStep, query = i < queries ? query_of_tile(problem, tile, i) : -1;
      row[k] = query < 0 ? -1 : tile.image * problem.queries + query;
      const bool there = row[k] >= 0 && lane < problem.samples;
      const int index = there ? (row[k] * problem.heads + tile.head) * problem.samples + lane : 0;
      place[k] = Access::read_pair(problem.places, index), weight[k] = Access::read(problem.weights, index);
    }
#pragma unroll 1
    for (int k = 0; k < kTogether; ++k) {
      const int first = row[0] < 0 ? 0 : (row[0] * problem.heads + tile.head) * problem.samples;
      Softmax<float> soft;
      if constexpr (FUSED) {
        const float logit[1] = {weight[0]};
        soft = problem.samples <= kSlotLanes ? softmax_of<kSlotLanes>(logit, row[0] < 0 ? 0 : problem.samples - lane)
                                             : softmax<kSlotLanes, float>(problem, first, lane, row[0] >= 0);
      }
      for (int s = lane; s < (row[0] < 0 ? 0 : problem.samples); s += kSlotLanes) {
        if (s != lane) {
          place[0] = Access::read_pair(problem.places, first + s), weight[0] = Access::read(problem.weights, first + s);
        }
        if constexpr (FUSED) weight[0] = expf(weight[0] - soft.top) * soft.scale;
        keep_sample(problem, memory, (from + k * kStep) * problem.samples + s, s, row[0], place[0], weight[0]);
      }
#pragma unroll
      for (int next = 1; next < kTogether; ++next) {  // no index that changes: all stays in registers
        row[next - 1] = row[next], place[next - 1] = place[next], weight[next - 1] = weight[next];
      }
    }
  }
}

// Counts become the places of the first samples; returns the number of all.
__device__ __forceinline__ int sum_keys(int* keys, int* warp_sum) {
  constexpr int kMine = kKeys / kTileThreads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int mine[kMine], sum = 0;
#pragma unroll
  for (int k = 0; k < kMine; ++k) mine[k] = keys[place_of(threadIdx.x * kMine + k)], sum += mine[k];
  const int own = sum;
  sum = sum_up_to(own, lane);
  if (lane == kWarp - 1) warp_sum[warp] = sum;
  __syncthreads();
  int start = sum - own, all = 0;
#pragma unroll
  for (int w = 0; w < kTileWarps; ++w) {
    if (w < warp) start += warp_sum[w];
    all += warp_sum[w];
  }
#pragma unroll
  for (int k = 0; k < kMine; ++k) keys[place_of(threadIdx.x * kMine + k)] = start, start += mine[k];
  __syncthreads();
  return all;
}

__device__ __forceinline__ void sort_tile(const Problem& problem, const Tile& tile, const TileMemory& memory, int all) {
  for (int i = threadIdx.x; i < all; i += kTileThreads) {
    const int query = divide(i, problem.by_samples);
    const unsigned place = query_of_tile(problem, tile, query) < 0 ? 0 : memory.places[i];
    if (!(place >> 29)) continue;
    const unsigned level = level_of(problem, i - query * problem.samples);
    const int to = memory.keys[place_of(place >> 12 & (kKeys - 1))] + (place & 0xfffu);
    memory.order[to] = i | (place >> 24 & 31u) << kNeighboursAt | level << kLevelAt |
                       static_cast<unsigned>(query) << kQueryAt;
  }
}

template <typename T, int D>
__device__ __forceinline__ void load_rows(const Problem& problem, const Tile& tile, const T* grad, T* rows,
                                          int queries) {
  constexpr int kPackets = D * sizeof(T) / sizeof(uint4);
  for (int i = threadIdx.x; i < queries * kPackets; i += kTileThreads) {
    const int query = query_of_tile(problem, tile, i / kPackets);
    if (query < 0) continue;
    const size_t slot = (static_cast<size_t>(tile.image) * problem.queries + query) * problem.heads + tile.head;
    reinterpret_cast<uint4*>(rows)[i] = __ldg(reinterpret_cast<const uint4*>(grad + slot * D) + i % kPackets);
  }
}

constexpr unsigned kRows = (kHasTop | kHasBottom) << kNeighboursAt;
constexpr unsigned kRowsAndLevel = kRows | 0xffu << kLevelAt;

// Eight channels of a head for a lane: four in its first half, and four in its second. So lanes side by side have
// channels side by side, in loads as in additions.
template <int D>
struct Channels {
  static constexpr int kLanes = D / 8, kHalf = D / 2;

  static __device__ __forceinline__ void load(const float* from, float (&x)[8]) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(from));
    const float4 b = __ldg(reinterpret_cast<const float4*>(from + kHalf));
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }

  template <typename T>
  static __device__ __forceinline__ void load(const T* from, float (&x)[8]) {
    const uint2 a = __ldg(reinterpret_cast<const uint2*>(from));
    const uint2 b = __ldg(reinterpret_cast<const uint2*>(from + kHalf));
    Packet<T>::unpack(make_uint4(a.x, a.y, b.x, b.y), x);
  }

  // From shared memory.
  static __device__ __forceinline__ void read(const float* from, float (&x)[8]) {
    const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + kHalf);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }

  template <typename T>
  static __device__ __forceinline__ void read(const T* from, float (&x)[8]) {
    const uint2 a = *reinterpret_cast<const uint2*>(from), b = *reinterpret_cast<const uint2*>(from + kHalf);
    Packet<T>::unpack(make_uint4(a.x, a.y, b.x, b.y), x);
  }

  static __device__ __forceinline__ void add(float* to, const float (&x)[8]) {
    add_atomically(to, make_float4(x[0], x[1], x[2], x[3]));
    add_atomically(to + kHalf, make_float4(x[4], x[5], x[6], x[7]));
  }
};

// A column of two tokens, one above the other, at one lane's channels, and what they are to get. Of the two columns of
// a cell, one is even and one is odd; each is the business of one half of the lanes. So a cell to the right has one
// column in common with its neighbour, and lanes that hold it have nothing to do.
template <typename T, int D, bool ADD>
struct Column {
  const T* value;         // token 0
  float* sums;            // the same
  int token = -1;         // in the upper row; -1: none
  unsigned vertical = 0;  // which of the two there are, and the level
  int above = 0, below = 0;  // elements from token 0; at the border, both are the same token
  float upper[8], lower[8], upper_sum[8], lower_sum[8];

  __device__ __forceinline__ Column(const T* value_, float* sums_) : value(value_), sums(sums_) {
#pragma unroll
    for (int v = 0; v < 8; ++v) upper[v] = lower[v] = upper_sum[v] = lower_sum[v] = 0;
  }

  __device__ __forceinline__ void go(int to, unsigned to_vertical, int width, int stride) {
    leave();
    token = to, vertical = to_vertical;
    if (token < 0) return;
    above = token * stride, below = above + ((vertical & kRows) == kRows ? width * stride : 0);
    Channels<D>::load(value + above, upper), Channels<D>::load(value + below, lower);
#pragma unroll
    for (int v = 0; v < 8; ++v) upper_sum[v] = lower_sum[v] = 0;
  }

  __device__ __forceinline__ void leave() {
    if constexpr (ADD) {
      if (token < 0) return;
      if (vertical & kHasTop << kNeighboursAt) Channels<D>::add(sums + above, upper_sum);
      if (vertical & kHasBottom << kNeighboursAt) Channels<D>::add(sums + below, lower_sum);
    }
  }
};

// Two times D / 8 lanes, a half for each column, go along their part of the sorted samples. All lanes of the block take
// every step together.
template <typename T, int D, bool ADD>
__device__ __forceinline__ void walk_tile(const Problem& problem, const Tile& tile, const TileMemory& memory, int all,
                                          const T* value, float* sums) {
  constexpr int kLanes = D / 8, kBatch = kSamplesAtATime;
  constexpr int kGroups = kTileThreads / (2 * kLanes), kSpare = kLanes / kBatch;
  const int lane = threadIdx.x % kLanes, stride = problem.heads * D;
  const unsigned odd = threadIdx.x / kLanes & 1;
  const int steps = (all + kGroups - 1) / kGroups, first = static_cast<int>(threadIdx.x / (2 * kLanes)) * steps;
  const int end = min(first + steps, all);
  const T* const rows = static_cast<const T*>(memory.rows) + lane * 4;
  const size_t start = static_cast<size_t>(tile.image) * problem.tokens * stride + tile.head * D + lane * 4;
  Column<T, D, ADD> column(settled(value + start), sums + start);

  for (int i = first; i < first + steps; i += kBatch) {
    float dot[2 * kBatch];  // of the gradient rows and the upper, lower token
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      float weight = 0, down = 0, g[8] = {};
      if (i + k < end) {
        const unsigned order = memory.order[i + k], right = (order >> kOddAt ^ odd) & 1;
        const float4 sample = memory.samples[order & kNumber];
        Channels<D>::read(rows + (order >> kQueryAt) * D, g);
        weight = right ? sample.z * sample.x : sample.z - sample.z * sample.x, down = sample.y;
        const bool there = order >> kNeighboursAt & (right ? kHasRight : kHasLeft);
        const int token = there ? __float_as_int(sample.w) + static_cast<int>(right) : -1;
        const unsigned vertical = order & kRowsAndLevel;
        if (token != column.token || vertical != column.vertical) {
          column.go(token, vertical, problem.level[order >> kLevelAt & 0xffu].width, stride);
        }
      }
      const float lower = weight * down, upper = weight - lower;
      float to_upper = 0, to_lower = 0;
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        if constexpr (ADD) {
          column.upper_sum[v] = fmaf(upper, g[v], column.upper_sum[v]);
          column.lower_sum[v] = fmaf(lower, g[v], column.lower_sum[v]);
        }
        to_upper = fmaf(g[v], column.upper[v], to_upper), to_lower = fmaf(g[v], column.lower[v], to_lower);
      }
      dot[2 * k] = to_upper, dot[2 * k + 1] = to_lower;
    }
    // Sums over the lanes of a half; each lane ends with both products of one sample.
    share_out<2 * kBatch, kLanes / 2, kSpare>(dot, lane);
#pragma unroll
    for (int bit = kSpare / 2; bit > 0; bit /= 2) {
      dot[0] += __shfl_xor_sync(kAllLanes, dot[0], bit), dot[1] += __shfl_xor_sync(kAllLanes, dot[1], bit);
    }
    const int own = i + lane / kSpare;
    unsigned order = 0;
    float4 sample = make_float4(0, 0, 0, 0);
    if (own < end) order = memory.order[own], sample = memory.samples[order & kNumber];
    const unsigned right = (order >> kOddAt ^ odd) & 1;
    const unsigned there = order >> kNeighboursAt & (right ? kHasRight : kHasLeft) ? order >> kNeighboursAt : 0;
    const float top = there & kHasTop ? dot[0] : 0, bottom = there & kHasBottom ? dot[1] : 0;
    const float by_y = bottom - top, here = fmaf(sample.y, by_y, top);
    const float other_by_y = __shfl_xor_sync(kAllLanes, by_y, kLanes), other = __shfl_xor_sync(kAllLanes, here, kLanes);
    __syncwarp();  // the samples have been read
    if (own < end && !right && lane % kSpare == 0) {  // this is the left half, the other one the right
      memory.samples[order & kNumber] =
          make_float4(sample.z, fmaf(sample.x, other - here, here), sample.z * (other - here),
                      sample.z * fmaf(sample.x, other_by_y - by_y, by_y));
    }
  }
  column.leave();
}

// Writes the gradients of places and weights and, if it is wanted, that of the reference before the sum over heads.
template <bool FUSED, typename Access>
__device__ __forceinline__ void finish_tile(const Problem& problem, const Tile& tile, const TileMemory& memory,
                                            const Gradients<float>& gradients, int queries) {
  const int lane = threadIdx.x % kSlotLanes;
  for (int i = threadIdx.x / kSlotLanes; i < queries; i += kTileThreads / kSlotLanes) {
    const int query = query_of_tile(problem, tile, i), row = tile.image * problem.queries + query;
    const int end = query >= 0 ? problem.samples : 0, slot = row * problem.heads + tile.head;
    const int first = slot * problem.samples;
    const float4* const samples = memory.samples + i * problem.samples;
    float weighted = 0;  // sum of weight * its gradient
    for (int s = lane; s < end; s += kSlotLanes) {
      const float4 sample = samples[s];
      const int l = level_of(problem, s);
      const Pair<float> unit = unit_of<float>(problem, problem.level[l], l, row);
      Access::write_pair(gradients.places, first + s, sample.z * unit.x, sample.w * unit.y);
      if constexpr (!FUSED) Access::write(gradients.weights, first + s, sample.y);
      weighted = fmaf(sample.x, sample.y, weighted);
    }
    if constexpr (FUSED) {
      weighted = sum_lanes<kSlotLanes>(weighted);
      for (int s = lane; s < end; s += kSlotLanes) {
        Access::write(gradients.weights, first + s, samples[s].x * (samples[s].y - weighted));
      }
      if (gradients.reference && query >= 0) write_reference<kSlotLanes>(problem, gradients, samples, slot, lane);
    }
  }
}

// `sums` gets the gradient of the values, if ADD.
template <typename T, int D, bool FUSED, bool ADD>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    backward_tiles(const __grid_constant__ Problem problem, const T* __restrict__ grad, const T* __restrict__ value,
                   const __grid_constant__ Gradients<float> gradients, float* sums) {
  extern __shared__ float4 tile_samples[];
  const Tile tile = tile_of_block(problem);
  const int queries = 1 << (problem.tile_columns_log2 + problem.tile_rows_log2), all = queries * problem.samples;
  const TileMemory memory = tile_memory(tile_samples, all);
  for (int i = threadIdx.x; i < kKeyNumbers; i += kTileThreads) memory.keys[i] = 0;
  __syncthreads();
  if (problem.uniform) {
    locate_tile<FUSED, Uniform<T>>(problem, tile, memory, queries);
  } else {
    locate_tile<FUSED, Mixed>(problem, tile, memory, queries);
  }
  __syncthreads();
  const int inside = sum_keys(memory.keys, memory.warp_sum);
  sort_tile(problem, tile, memory, all);
  __syncthreads();
  load_rows<T, D>(problem, tile, grad, static_cast<T*>(memory.rows), queries);
  __syncthreads();
  walk_tile<T, D, ADD>(problem, tile, memory, inside, value, sums);
  __syncthreads();
  if (problem.uniform) {
    finish_tile<FUSED, Uniform<T>>(problem, tile, memory, gradients, queries);
  } else {
    finish_tile<FUSED, Mixed>(problem, tile, memory, gradients, queries);
  }
}

}  // namespace dino
