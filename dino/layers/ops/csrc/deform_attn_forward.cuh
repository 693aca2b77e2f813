// Multi-scale deformable attention, forward, on CUDA devices.

#pragma once

#include "deform_attn_samples.cuh"

namespace dino {

constexpr int kForwardThreads = 256;
constexpr int kForwardBlocks = 4;  // at least so many on a multiprocessor: up to 64 registers a thread

// Shared memory of a block: of each slot, the samples that are prepared at a time.
template <typename T, int D>
struct ForwardMemory {
  static constexpr int kLanes = D / Packet<T>::kSize, kSlots = kForwardThreads / kLanes;
  static constexpr int kChunk = kLanes < 8 ? 2 * kLanes : kLanes < 16 ? 16 : kLanes;
  int4 offsets[kSlots][kChunk + 1];  // one more than needed: slots lie in different banks
  float4 parts[kSlots][kChunk + 1];
};

// Head widths of 16, 32, 64 and 128, values aligned to 16 bytes.
//
// A slot is one query and head. Its D channels are spread over kLanes lanes, 16 bytes each. The arithmetic that all
// channels have in common is done once per sample: each lane prepares other samples and leaves offsets and shares in
// shared memory, from where all lanes of the slot read them. A slot never leaves its warp, so no barrier of the block
// is needed. Samples outside the image are left out.
template <typename T, int D, bool FUSED, typename Access>
__device__ __forceinline__ void forward_tile(const Problem& problem, const T* __restrict__ value,
                                             T* __restrict__ output, ForwardMemory<T, D>& memory) {
  constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kSlots = kForwardThreads / kLanes;
  constexpr int kChunk = ForwardMemory<T, D>::kChunk;
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const int first_lane = (threadIdx.x % kWarp) / kLanes * kLanes;  // of the slot, in the warp
  const Tile tile = tile_of_block(problem);
  // Slots next to each other are the same query in the heads of a block, which share the lines of the nearest cache.
  const int head = tile.head + (slot & ((1 << problem.heads_log2) - 1));
  const int stride = problem.heads * D, channel = head * D + lane * kSize;
  const T* source = settled(value + static_cast<size_t>(tile.image) * problem.tokens * stride + channel);
  const int tile_size = 1 << (problem.tile_columns_log2 + problem.tile_rows_log2 + problem.heads_log2);

  for (int i = slot; i < tile_size; i += kSlots) {  // whole warps leave the loop together
    const int query = query_of_tile(problem, tile, i >> problem.heads_log2);
    const bool active = query >= 0;
    const int row = tile.image * problem.queries + query;
    const int first = (row * problem.heads + head) * problem.samples;
    Softmax<float> soft;
    if (FUSED && problem.samples > kChunk) soft = softmax<kLanes, float>(problem, first, lane, active);
    float sum[kSize] = {};
    for (int chunk = 0; chunk < problem.samples; chunk += kChunk) {
      int count = 0;
      __syncwarp();  // the samples before have been read
      Pair<float> place[kChunk / kLanes];
      float weight[kChunk / kLanes];
#pragma unroll
      for (int k = 0; k < kChunk / kLanes; ++k) {  // all loads first: they are waited for together
        const int s = chunk + k * kLanes + lane;
        if (active && s < problem.samples) {
          place[k] = Access::read_pair(problem.places, first + s);
          weight[k] = Access::read(problem.weights, first + s);
        }
      }
      if (FUSED && problem.samples <= kChunk) {
        soft = softmax_of<kLanes>(weight, active ? problem.samples - lane : 0);
      }
#pragma unroll
      for (int k = 0; k < kChunk / kLanes; ++k) {
        const int s = chunk + k * kLanes + lane;
        bool inside = false;
        int4 offset;
        float part[4];
        if (active && s < problem.samples) {
          const int l = level_of(problem, s);
          const Level level = problem.level[l];
          const Sample<float> sample = locate<float>(problem, level, l, row, place[k]);
          if (FUSED) weight[k] = exponential(weight[k] - soft.top) * soft.scale;
          inside = sample.inside;
          offset = neighbours(sample, level, stride);
          shares(sample, level, weight[k], part);
        }
        const unsigned votes = (__ballot_sync(kAllLanes, inside) >> first_lane) & (kAllLanes >> (kWarp - kLanes));
        if (inside) {
          const int position = count + __popc(votes & ((1u << lane) - 1));
          memory.offsets[slot][position] = offset;
          memory.parts[slot][position] = make_float4(part[0], part[1], part[2], part[3]);
        }
        count += __popc(votes);
      }
      __syncwarp();
#pragma unroll 1
      for (int s = 0; s < count; ++s) {
        const int4 offset = memory.offsets[slot][s];
        const float4 part = memory.parts[slot][s];
        float a[kSize], b[kSize], c[kSize], d[kSize];
        Packet<T>::load(source + offset.x, a);
        Packet<T>::load(source + offset.y, b);
        Packet<T>::load(source + offset.z, c);
        Packet<T>::load(source + offset.w, d);
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          sum[v] = fmaf(part.x, a[v], sum[v]);
          sum[v] = fmaf(part.y, b[v], sum[v]);
          sum[v] = fmaf(part.z, c[v], sum[v]);
          sum[v] = fmaf(part.w, d[v], sum[v]);
        }
      }
    }
    if (active) Packet<T>::store(output + static_cast<size_t>(row) * stride + channel, sum);
  }
}

template <typename T, int D, bool FUSED>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks)
    forward_packets(const __grid_constant__ Problem problem, const T* __restrict__ value, T* __restrict__ output) {
  __shared__ ForwardMemory<T, D> memory;
  if (problem.uniform) {
    forward_tile<T, D, FUSED, Uniform<T>>(problem, value, output, memory);
  } else {
    forward_tile<T, D, FUSED, Mixed>(problem, value, output, memory);
  }
}

// Any head dimension, any type: a warp for each query and head, a lane for each channel.
template <typename T>
__global__ void forward_any(const __grid_constant__ Problem problem, const T* __restrict__ value,
                            T* __restrict__ output) {
  using A = typename Accumulator<T>::type;
  const int lane = threadIdx.x % kWarp;
  const long long slot = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;  // (row, head)
  if (slot >= static_cast<long long>(problem.batch) * problem.queries * problem.heads) return;
  const int head = slot % problem.heads, row = slot / problem.heads, image = row / problem.queries;
  const int first = slot * problem.samples, stride = problem.heads * problem.dim;
  const T* source = value + static_cast<size_t>(image) * problem.tokens * stride + head * problem.dim;
  Softmax<A> soft;
  if (problem.box) soft = softmax<kWarp, A>(problem, first, lane, true);
  for (int block = 0; block < problem.dim; block += kWarp) {
    const int channel = block + lane;
    A sum = 0;
    for (int s = 0; s < problem.samples; ++s) {
      const int l = level_of(problem, s);
      const Level& level = problem.level[l];
      const Sample<A> sample = locate<A>(problem, level, l, row, read_pair<A>(problem.places, first + s));
      if (!sample.inside || channel >= problem.dim) continue;
      A weight = read<A>(problem.weights, first + s), part[4];
      if (problem.box) weight = exponential(weight - soft.top) * soft.scale;
      const int4 offset = neighbours(sample, level, stride);
      shares(sample, level, weight, part);
      const T* from = source + channel;
      sum += part[0] * widen(from[offset.x]) + part[1] * widen(from[offset.y]) + part[2] * widen(from[offset.z]) +
             part[3] * widen(from[offset.w]);
    }
    if (channel < problem.dim) output[slot * problem.dim + channel] = narrow<T>(sum);
  }
}

}  // namespace dino
