// The backward pass from query to query, on CUDA devices: reads what forward read, writes the gradients of places and
// weights (of offsets, logits and reference in the fused form), and adds a share to the gradient of each token that a
// sample touches, by atomic additions. For queries that are not the cells of the pyramid: see deform_attn_tiles.cuh.

#pragma once

#include "deform_attn_samples.cuh"

namespace dino {

constexpr int kBackwardThreads = 128;
constexpr int kBackwardBlocks = 3;  // at least so many on a multiprocessor: up to 168 registers a thread, none spilled

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
template <int COUNT, typename T, int D>
__device__ __forceinline__ void products(const Row<T, D>& row, int sample, float (&dot)[4]) {
  if constexpr (COUNT > 1) {
    float other[4];
    products<COUNT / 2>(row, sample, dot);
    products<COUNT / 2>(row, sample + COUNT / 2, other);
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

// The second half of the fused form, once all samples of a slot are known: kept[s] = weight, its gradient, d/dx, d/dy,
// x and y in cells.
template <int LANES>
__device__ __forceinline__ void finish_slot(const Problem& problem, const Gradients<float>& gradients,
                                            const float4* kept, int slot, int lane, float weighted) {
  const int first = slot * problem.samples;
  for (int s = lane; s < problem.samples; s += LANES) {
    write<float>(gradients.weights, first + s, kept[s].x * (kept[s].y - weighted));
  }
  if (gradients.reference) write_reference<LANES>(problem, gradients, kept, slot, lane);
}

// As forward_packets, with a group of samples at a time: lane i of a slot prepares sample i, all lanes read the
// neighbours of all samples, and lane i ends with what it needs for the gradients of sample i.
template <typename T, int D, bool FUSED>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    backward_packets(const __grid_constant__ Problem problem, const T* __restrict__ grad, const T* __restrict__ value,
                     const __grid_constant__ Gradients<float> gradients, float* sums) {
  constexpr int kSize = Packet<T>::kSize, kLanes = D / kSize, kSlots = kBackwardThreads / kLanes;
  constexpr int kGroup = kLanes < 4 ? kLanes : 4;  // samples whose products are formed together
  __shared__ int4 offsets[kSlots][kLanes + 1];
  __shared__ float4 parts[kSlots][kLanes + 1];
  extern __shared__ float4 kept_by_slots[];  // FUSED: (kSlots, L * P)
  const int slot_of_block = threadIdx.x / kLanes;
  const Tile tile = tile_of_block(problem);
  const int stride = problem.heads * D, tile_size = 1 << (problem.tile_columns_log2 + problem.tile_rows_log2);
  const size_t image = static_cast<size_t>(tile.image) * problem.tokens * stride;

  Row<T, D> row;
  const int lane = row.lane = threadIdx.x % kLanes;
  row.value = settled(value + image + tile.head * D + lane * kSize);
  // Not settled: reductions need a pointer that is known to be global.
  row.sums = sums + image + tile.head * D + lane * 4;
  row.offsets = offsets[slot_of_block];
  row.parts = parts[slot_of_block];
  float4* const kept = kept_by_slots + slot_of_block * problem.samples;

  for (int i = slot_of_block; i < tile_size; i += kSlots) {
    const int query = query_of_tile(problem, tile, i);
    const bool active = query >= 0;
    const int query_row = tile.image * problem.queries + query, slot = query_row * problem.heads + tile.head;
    const int first = slot * problem.samples;
    const T* grad_row = grad + static_cast<size_t>(active ? slot : 0) * D;
    Packet<T>::load(grad_row + lane * kSize, row.grad);
#pragma unroll
    for (int k = 0; k < Row<T, D>::kParts; ++k) {
      const T* from = grad_row + 4 * (lane + k * kLanes);
      row.spread[k] = make_float4(widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3]));
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
          shares(sample, level, weight, part);
        }
      }
      __syncwarp();  // the group before has been read
      offsets[slot_of_block][lane] = offset;
      parts[slot_of_block][lane] = make_float4(part[0], part[1], part[2], part[3]);
      __syncwarp();
      float dot[4];
#pragma unroll 1
      for (int some = 0; some < kLanes; some += kGroup) {  // unrolled, this loop would take too many registers
        if (group + some >= problem.samples) break;
        float of_some[4];
        products<kGroup>(row, some, of_some);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int bit = kGroup; bit < kLanes; bit *= 2) of_some[c] += __shfl_xor_sync(kAllLanes, of_some[c], bit);
          if (lane / kGroup * kGroup == some) dot[c] = of_some[c];
        }
      }
      if (mine) {
        const SampleGradient<float> gradient(sample, level, weight, dot);
        write_pair<float>(gradients.places, first + s, gradient.x * sample.unit_x, gradient.y * sample.unit_y);
        if constexpr (FUSED) {
          kept[s] = make_float4(weight, gradient.weight, gradient.x, gradient.y);
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

// Any head dimension, any type: a warp for each query and head, a lane for each channel. `sums` is null where lists make
// the gradient of the values.
template <typename T>
__global__ void backward_any(const __grid_constant__ Problem problem, const T* __restrict__ grad,
                             const T* __restrict__ value,
                             const __grid_constant__ Gradients<typename Accumulator<T>::type> gradients,
                             typename Accumulator<T>::type* sums) {
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
        if (lane < 4 && gradients.reference) {
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
