// Multi-scale deformable attention, forward, on CUDA devices.

#pragma once

#include "deform_attn_samples.cuh"

namespace dino {

constexpr int kForwardThreads = 256;
constexpr int kForwardBlocks = 3;  // at least so many on a multiprocessor: up to 80 registers a thread, none spilled

// Head dimensions of 64, 128 or 256 bytes, values aligned to 16 bytes.
//
// A slot is one query and head. Its D channels are spread over kLanes lanes, 16 bytes each. The arithmetic that all
// channels have in common is done once per sample: each lane prepares other samples and leaves offsets and shares in
// shared memory, from where all lanes of the slot read them. A slot never leaves its warp, so no barrier of the block
// is needed. Samples outside the image are left out.
template <typename T, int D, bool FUSED>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks)
    forward_packets(const __grid_constant__ Problem problem, const T* __restrict__ value, T* __restrict__ output) {
  constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kSlots = kForwardThreads / kLanes;
  constexpr int kChunk = kLanes < 8 ? 2 * kLanes : 16;  // samples of a slot that are prepared at a time
  __shared__ int4 offsets[kSlots][kChunk + 1];  // one more than needed: slots lie in different banks
  __shared__ float4 parts[kSlots][kChunk + 1];
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const int first_lane = (threadIdx.x % kWarp) / kLanes * kLanes;  // of the slot, in the warp
  const Tile tile = tile_of_block(problem);
  const int stride = problem.heads * D, channel = tile.head * D + lane * kSize;
  const T* source = settled(value + static_cast<size_t>(tile.image) * problem.tokens * stride + channel);
  const int tile_size = 1 << (problem.tile_columns_log2 + problem.tile_rows_log2);

  for (int i = slot; i < tile_size; i += kSlots) {  // slots divide the size of a tile: no lane leaves the loop early
    const int query = query_of_tile(problem, tile, i);
    const bool active = query >= 0;
    const int row = tile.image * problem.queries + query;
    const int first = (row * problem.heads + tile.head) * problem.samples;
    Softmax<float> soft;
    if (FUSED) soft = softmax<kLanes, float>(problem, first, lane, active);
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
          place[k] = read_pair<float>(problem.places, first + s);
          weight[k] = read<float>(problem.weights, first + s);
        }
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
        const unsigned votes = (__ballot_sync(kAllLanes, inside) >> first_lane) & ((1u << kLanes) - 1);
        if (inside) {
          const int position = count + __popc(votes & ((1u << lane) - 1));
          offsets[slot][position] = offset;
          parts[slot][position] = make_float4(part[0], part[1], part[2], part[3]);
        }
        count += __popc(votes);
      }
      __syncwarp();
#pragma unroll 2
      for (int s = 0; s < count; ++s) {
        const int4 offset = offsets[slot][s];
        const float4 part = parts[slot][s];
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
