// What all CUDA kernels of multi-scale deformable attention share: where a sample lies, and who computes what.
//
// Letters: B images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
// Every tensor has fewer than 2^31 elements (deform_attn.h refuses others), so 32-bit indices are enough.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dino {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxLevels = 160;  // the table of levels travels with the arguments of a kernel, which hold 4096 bytes

// ---- Numbers of a type that is known when the program runs. Only values are numerous enough to deserve one kernel
// per type; locations, weights and what belongs to them are read through this.

enum class Kind { kFloat, kDouble, kHalf, kBFloat16 };

struct Numbers {
  void* data;
  Kind kind;
};

template <typename A>
__device__ __forceinline__ A read(const Numbers& numbers, int index) {
  switch (numbers.kind) {
    case Kind::kFloat: return static_cast<A>(__ldg(static_cast<const float*>(numbers.data) + index));
    case Kind::kDouble: return static_cast<A>(__ldg(static_cast<const double*>(numbers.data) + index));
    case Kind::kHalf: return static_cast<A>(__half2float(__ldg(static_cast<const __half*>(numbers.data) + index)));
    default: return static_cast<A>(__bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(numbers.data) + index)));
  }
}

template <typename A>
struct Pair {
  A x, y;
};

// Two numbers in one load, and in one store.
__device__ __forceinline__ float2 load_pair(const float* from) { return __ldg(reinterpret_cast<const float2*>(from)); }
__device__ __forceinline__ double2 load_pair(const double* from) {
  return __ldg(reinterpret_cast<const double2*>(from));
}
__device__ __forceinline__ float2 load_pair(const __half* from) {
  return __half22float2(__ldg(reinterpret_cast<const __half2*>(from)));
}
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* from) {
  return __bfloat1622float2(__ldg(reinterpret_cast<const __nv_bfloat162*>(from)));
}
__device__ __forceinline__ void store_pair(float* to, float2 x) { *reinterpret_cast<float2*>(to) = x; }
__device__ __forceinline__ void store_pair(__half* to, float2 x) {
  *reinterpret_cast<__half2*>(to) = __float22half2_rn(x);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float2 x) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __float22bfloat162_rn(x);
}

template <typename A, typename T>
__device__ __forceinline__ Pair<A> read_pair_of(const void* data, int pair) {
  const auto x = load_pair(static_cast<const T*>(data) + 2 * static_cast<long long>(pair));
  return {static_cast<A>(x.x), static_cast<A>(x.y)};
}

// Numbers 2 * pair and 2 * pair + 1.
template <typename A>
__device__ __forceinline__ Pair<A> read_pair(const Numbers& numbers, int pair) {
  switch (numbers.kind) {
    case Kind::kFloat: return read_pair_of<A, float>(numbers.data, pair);
    case Kind::kDouble: return read_pair_of<A, double>(numbers.data, pair);
    case Kind::kHalf: return read_pair_of<A, __half>(numbers.data, pair);
    default: return read_pair_of<A, __nv_bfloat16>(numbers.data, pair);
  }
}

// References are float or double.
template <typename A>
__device__ __forceinline__ Pair<A> read_reference(const Numbers& numbers, int pair) {
  return numbers.kind == Kind::kDouble ? read_pair_of<A, double>(numbers.data, pair)
                                       : read_pair_of<A, float>(numbers.data, pair);
}

template <typename A>
__device__ __forceinline__ void write_pair(const Numbers& numbers, int pair, A x, A y) {
  const float2 narrow = make_float2(static_cast<float>(x), static_cast<float>(y));
  switch (numbers.kind) {
    case Kind::kFloat: store_pair(static_cast<float*>(numbers.data) + 2 * static_cast<long long>(pair), narrow); break;
    case Kind::kDouble: static_cast<double2*>(numbers.data)[pair] = make_double2(x, y); break;
    case Kind::kHalf: store_pair(static_cast<__half*>(numbers.data) + 2 * static_cast<long long>(pair), narrow); break;
    default: store_pair(static_cast<__nv_bfloat16*>(numbers.data) + 2 * static_cast<long long>(pair), narrow);
  }
}

template <typename A>
__device__ __forceinline__ void write(const Numbers& numbers, int index, A x) {
  switch (numbers.kind) {
    case Kind::kFloat: static_cast<float*>(numbers.data)[index] = static_cast<float>(x); break;
    case Kind::kDouble: static_cast<double*>(numbers.data)[index] = static_cast<double>(x); break;
    case Kind::kHalf: static_cast<__half*>(numbers.data)[index] = __float2half_rn(static_cast<float>(x)); break;
    default: static_cast<__nv_bfloat16*>(numbers.data)[index] = __float2bfloat16_rn(static_cast<float>(x));
  }
}

// ---- Values: sums are kept in float, or in double where values are double.

template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <typename T> __device__ __forceinline__ T narrow(double x) { return static_cast<T>(x); }

// How kernels read and write places and weights: of any types, or, with a fraction of the instructions, all of type T.
struct Mixed {
  static __device__ __forceinline__ float read(const Numbers& x, int i) { return dino::read<float>(x, i); }
  static __device__ __forceinline__ Pair<float> read_pair(const Numbers& x, int i) {
    return dino::read_pair<float>(x, i);
  }
  static __device__ __forceinline__ void write(const Numbers& to, int i, float x) { dino::write<float>(to, i, x); }
  static __device__ __forceinline__ void write_pair(const Numbers& to, int i, float x, float y) {
    dino::write_pair<float>(to, i, x, y);
  }
};

template <typename T>
struct Uniform {
  static __device__ __forceinline__ float read(const Numbers& x, int i) {
    return widen(__ldg(static_cast<const T*>(x.data) + i));
  }
  static __device__ __forceinline__ Pair<float> read_pair(const Numbers& x, int i) {
    return read_pair_of<float, T>(x.data, i);
  }
  static __device__ __forceinline__ void write(const Numbers& to, int i, float x) {
    static_cast<T*>(to.data)[i] = narrow<T>(x);
  }
  static __device__ __forceinline__ void write_pair(const Numbers& to, int i, float x, float y) {
    store_pair(static_cast<T*>(to.data) + 2 * static_cast<long long>(i), make_float2(x, y));
  }
};

// Sixteen bytes of values: the widest load there is on every architecture.
template <typename T> struct Packet;

template <> struct Packet<float> {
  static constexpr int kSize = 4;
  static __device__ __forceinline__ void load(const float* from, float (&x)[4]) {
    const float4 bits = __ldg(reinterpret_cast<const float4*>(from));
    x[0] = bits.x, x[1] = bits.y, x[2] = bits.z, x[3] = bits.w;
  }
  static __device__ __forceinline__ void store(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  }
};

template <> struct Packet<__half> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ void load(const __half* from, float (&x)[8]) {
    unpack(__ldg(reinterpret_cast<const uint4*>(from)), x);
  }
  static __device__ __forceinline__ void unpack(uint4 bits, float (&x)[8]) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
      x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    }
  }
  static __device__ __forceinline__ void store(__half* to, const float (&x)[8]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __half_as_ushort(__float2half_rn(x[2 * i])) |
                 static_cast<unsigned>(__half_as_ushort(__float2half_rn(x[2 * i + 1]))) << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <> struct Packet<__nv_bfloat16> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ void load(const __nv_bfloat16* from, float (&x)[8]) {
    unpack(__ldg(reinterpret_cast<const uint4*>(from)), x);
  }
  static __device__ __forceinline__ void unpack(uint4 bits, float (&x)[8]) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // bfloat16 is the upper half of a float
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ void store(__nv_bfloat16* to, const float (&x)[8]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[2 * i])) |
                 static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(x[2 * i + 1]))) << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// The same pointer, of unknown origin. Otherwise the compiler takes sums of a pointer, a large and a small index apart
// to add them in another order, and needs four instructions for an address instead of one.
template <typename P>
__device__ __forceinline__ P* settled(P* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// ---- The problem

// Exact division of numbers below 2^31 by a number that is known when the program runs, as a product.
struct Division {
  unsigned multiplier;  // 0: by one
  int shift;
};

__device__ __forceinline__ int divide(int x, const Division& by) {
  return by.multiplier ? static_cast<int>(__umulhi(static_cast<unsigned>(x), by.multiplier) >> by.shift) : x;
}

struct Level {
  int height, width;
  int start;        // its first token
  int lists;        // its first list: see deform_attn_lists.cuh
  int copies_log2;  // lists of a cell
};

struct Problem {
  int batch, tokens, heads, dim, queries, levels, points, samples;  // samples = levels * points
  int box;              // coordinates of a reference, 2 or 4; 0: places are locations, not offsets
  int lists;            // of one head of one image
  Division by_points, by_samples, by_heads, by_queries;
  int tiles;            // of one head of one image
  int tile_columns_log2, tile_rows_log2;
  int heads_log2;  // heads that a block of forward works on
  bool uniform;    // places and weights are of the type of the values
  bool pyramid;    // queries are the cells of the pyramid, so tiles are rectangles of it
  Numbers places;  // (B, Q, M, L, P, 2): locations as fractions of a level, or raw offsets
  Numbers weights;  // (B, Q, M, L, P): as they are, or logits where places are offsets
  Numbers reference;  // (B, Q, L, box)
  Level level[kMaxLevels];
};

__device__ __forceinline__ int level_of(const Problem& problem, int sample) {
  return divide(sample, problem.by_points);
}

__device__ __forceinline__ float fused_multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double fused_multiply_add(double x, double y, double z) { return fma(x, y, z); }
__device__ __forceinline__ float largest(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double largest(double x, double y) { return fmax(x, y); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// One sample: cell (x, y) is its upper left neighbour, (right, down) the distance to that cell's centre, in [0, 1).
template <typename A>
struct Sample {
  int x, y;
  A right, down;
  A unit_x, unit_y;  // cells that one unit of `places` is worth
  bool inside;       // touches a cell of the level; false for a location that is no number

  __device__ __forceinline__ bool has_left() const { return x >= 0; }
  __device__ __forceinline__ bool has_top() const { return y >= 0; }
  __device__ __forceinline__ bool has_right(const Level& level) const { return x + 1 < level.width; }
  __device__ __forceinline__ bool has_bottom(const Level& level) const { return y + 1 < level.height; }
};

// Cells that one unit of `places` is worth. `row` is image * Q + query.
template <typename A>
__device__ __forceinline__ Pair<A> unit_of(const Problem& problem, const Level& level, int l, int row) {
  if (problem.box == 2) return {static_cast<A>(1), static_cast<A>(1)};
  Pair<A> unit{static_cast<A>(level.width), static_cast<A>(level.height)};
  if (problem.box) {
    const Pair<A> size = read_reference<A>(problem.reference, (row * problem.levels + l) * 2 + 1);
    const A half = static_cast<A>(0.5) / static_cast<A>(problem.points);
    unit.x *= size.x * half, unit.y *= size.y * half;
  }
  return unit;
}

// Where `place`, a location or an offset, lies. `row` is image * Q + query.
//
// Kernels that rank, list and weigh samples must agree to the last bit on the cell, so no sum of products is left for
// the compiler to contract in one kernel and not in another.
template <typename A>
__device__ __forceinline__ Sample<A> locate(const Problem& problem, const Level& level, int l, int row, Pair<A> place) {
  Sample<A> s;
  const Pair<A> unit = unit_of<A>(problem, level, l, row);
  s.unit_x = unit.x, s.unit_y = unit.y;
  Pair<A> zero{static_cast<A>(-0.5), static_cast<A>(-0.5)};  // centres of cells have whole coordinates
  if (problem.box) {
    const Pair<A> centre = read_reference<A>(problem.reference, (row * problem.levels + l) * (problem.box / 2));
    zero.x = fused_multiply_add(centre.x, static_cast<A>(level.width), zero.x);
    zero.y = fused_multiply_add(centre.y, static_cast<A>(level.height), zero.y);
  }
  const A x = fused_multiply_add(place.x, s.unit_x, zero.x), y = fused_multiply_add(place.y, s.unit_y, zero.y);
  s.inside = x > -1 && y > -1 && x < static_cast<A>(level.width) && y < static_cast<A>(level.height);
  const A left = floor(x), top = floor(y);
  s.x = static_cast<int>(left), s.y = static_cast<int>(top);
  s.right = x - left, s.down = y - top;
  return s;
}

// Elements between the first token of an image and the four neighbours: upper left, upper right, lower left, lower
// right. A neighbour beyond the border is replaced by one of the others, so that reading it is harmless.
template <typename A>
__device__ __forceinline__ int4 neighbours(const Sample<A>& s, const Level& level, int stride) {
  const int left = max(s.x, 0), right = min(s.x + 1, level.width - 1);
  const int top = level.start + max(s.y, 0) * level.width;
  const int bottom = level.start + min(s.y + 1, level.height - 1) * level.width;
  return make_int4((top + left) * stride, (top + right) * stride, (bottom + left) * stride, (bottom + right) * stride);
}

// Their shares of the sample times `weight`; 0 beyond the border.
template <typename A>
__device__ __forceinline__ void shares(const Sample<A>& s, const Level& level, A weight, A (&share)[4]) {
  const A left = s.has_left() ? 1 - s.right : static_cast<A>(0);
  const A right = s.has_right(level) ? s.right : static_cast<A>(0);
  const A top = s.has_top() ? (1 - s.down) * weight : static_cast<A>(0);
  const A bottom = s.has_bottom(level) ? s.down * weight : static_cast<A>(0);
  share[0] = top * left, share[1] = top * right, share[2] = bottom * left, share[3] = bottom * right;
}

// Where gradients go.
template <typename A>
struct Gradients {
  Numbers places, weights;
  // Fused form, if wanted: (B, Q, M, L, 4), before the sum over heads: d/dx, d/dy, then times the offset in x, in y.
  A* reference;
  A* scratch;  // fused form of backward_any: (B, Q, M, L * P)
};

// Where a slot, one query and head, lies in (B, Q, M).
struct Slot {
  int row, image, head, query;  // row: image * Q + query

  __device__ __forceinline__ Slot(const Problem& problem, int slot) {
    row = divide(slot, problem.by_heads), head = slot - row * problem.heads;
    image = divide(row, problem.by_queries), query = row - image * problem.queries;
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

constexpr int kSlotLanes = 16;  // that work on a slot where lanes stand for samples, not for channels

// The gradient of the reference in the fused form, before the sum over heads, from samples {weight, d/dweight, d/dx,
// d/dy} with x and y in cells, by LANES lanes.
template <int LANES>
__device__ __forceinline__ void write_reference(const Problem& problem, const Gradients<float>& gradients,
                                                const float4* samples, int slot, int lane) {
  for (int l = lane; l < problem.levels; l += LANES) {
    const float width = problem.level[l].width, height = problem.level[l].height;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int s = l * problem.points; s < (l + 1) * problem.points; ++s) {
      const Pair<float> offset = read_pair<float>(problem.places, slot * problem.samples + s);
      const float x = samples[s].z * width, y = samples[s].w * height;
      sum.x += x, sum.y += y, sum.z = fmaf(x, offset.x, sum.z), sum.w = fmaf(y, offset.y, sum.w);
    }
    reinterpret_cast<float4*>(gradients.reference)[slot * problem.levels + l] = sum;
  }
}

// ---- Reductions among groups of SIZE neighbouring lanes; all lanes of the warp take part.

template <int SIZE, typename A>
__device__ __forceinline__ A sum_lanes(A x) {
#pragma unroll
  for (int bit = SIZE / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// Of the lanes of a warp up to this one.
__device__ __forceinline__ int sum_up_to(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

template <int SIZE, typename A>
__device__ __forceinline__ A max_lanes(A x) {
#pragma unroll
  for (int bit = SIZE / 2; bit > 0; bit /= 2) x = largest(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
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

// Softmax over the samples of one query and head, by SIZE lanes: exponential(logit - top) * scale is a weight.
template <typename A>
struct Softmax {
  A top, scale;
};

template <int SIZE, typename A>
__device__ __forceinline__ Softmax<A> softmax(const Problem& problem, int first, int lane, bool active) {
  const int end = active ? problem.samples : 0;
  A top = -static_cast<A>(INFINITY), sum = 0;
  for (int s = lane; s < end; s += SIZE) top = largest(top, read<A>(problem.weights, first + s));
  top = max_lanes<SIZE>(top);
  for (int s = lane; s < end; s += SIZE) sum += exponential(read<A>(problem.weights, first + s) - top);
  return {top, 1 / sum_lanes<SIZE>(sum)};
}

// The same from logits in registers, of which this lane has those that are SIZE * k < left.
template <int SIZE, int COUNT>
__device__ __forceinline__ Softmax<float> softmax_of(const float (&logit)[COUNT], int left) {
  float top = -INFINITY, sum = 0;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) top = k * SIZE < left ? fmaxf(top, logit[k]) : top;
  top = max_lanes<SIZE>(top);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) sum += k * SIZE < left ? expf(logit[k] - top) : 0;
  return {top, 1 / sum_lanes<SIZE>(sum)};
}

// ---- Who computes what: a block works on a tile of queries for one head of one image. Neighbouring queries read
// neighbouring cells, so a rectangle of queries finds most of what it reads in the nearest cache; a row, or all heads
// of a few queries, doesn't.

struct Tile {
  int image, head;
  int start, height, width;  // of the grid of queries
  int x, y;
};

__device__ __forceinline__ Tile tile_of_block(const Problem& problem) {
  Tile tile;
  int number = blockIdx.x % problem.tiles;
  const int image_and_head = blockIdx.x / problem.tiles;
  const int groups = problem.heads >> problem.heads_log2;
  tile.head = (image_and_head % groups) << problem.heads_log2, tile.image = image_and_head / groups;
  tile.start = 0, tile.height = 1, tile.width = problem.queries;
  int columns = problem.tiles;
  for (int l = 0; problem.pyramid; ++l) {
    const Level& level = problem.level[l];
    columns = (level.width + (1 << problem.tile_columns_log2) - 1) >> problem.tile_columns_log2;
    const int tiles = columns * ((level.height + (1 << problem.tile_rows_log2) - 1) >> problem.tile_rows_log2);
    if (number < tiles) {
      tile.start = level.start, tile.height = level.height, tile.width = level.width;
      break;
    }
    number -= tiles;
  }
  tile.x = (number % columns) << problem.tile_columns_log2;
  tile.y = (number / columns) << problem.tile_rows_log2;
  return tile;
}

// Query number `i` of a tile, or -1 beyond the border of the grid.
__device__ __forceinline__ int query_of_tile(const Problem& problem, const Tile& tile, int i) {
  const int x = tile.x + (i & ((1 << problem.tile_columns_log2) - 1)), y = tile.y + (i >> problem.tile_columns_log2);
  return x < tile.width && y < tile.height ? tile.start + y * tile.width + x : -1;
}

}  // namespace dino
