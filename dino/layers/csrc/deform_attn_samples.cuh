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

// Numbers 2 * pair and 2 * pair + 1, in one load.
template <typename A>
__device__ __forceinline__ Pair<A> read_pair(const Numbers& numbers, int pair) {
  switch (numbers.kind) {
    case Kind::kFloat: {
      const float2 x = __ldg(static_cast<const float2*>(numbers.data) + pair);
      return {static_cast<A>(x.x), static_cast<A>(x.y)};
    }
    case Kind::kDouble: {
      const double2 x = __ldg(static_cast<const double2*>(numbers.data) + pair);
      return {static_cast<A>(x.x), static_cast<A>(x.y)};
    }
    case Kind::kHalf: {
      const float2 x = __half22float2(__ldg(static_cast<const __half2*>(numbers.data) + pair));
      return {static_cast<A>(x.x), static_cast<A>(x.y)};
    }
    default: {
      const float2 x = __bfloat1622float2(__ldg(static_cast<const __nv_bfloat162*>(numbers.data) + pair));
      return {static_cast<A>(x.x), static_cast<A>(x.y)};
    }
  }
}

template <typename A>
__device__ __forceinline__ void write_pair(const Numbers& numbers, int pair, A x, A y) {
  const float2 narrow = make_float2(static_cast<float>(x), static_cast<float>(y));
  switch (numbers.kind) {
    case Kind::kFloat: static_cast<float2*>(numbers.data)[pair] = narrow; break;
    case Kind::kDouble: static_cast<double2*>(numbers.data)[pair] = make_double2(x, y); break;
    case Kind::kHalf: static_cast<__half2*>(numbers.data)[pair] = __float22half2_rn(narrow); break;
    default: static_cast<__nv_bfloat162*>(numbers.data)[pair] = __float22bfloat162_rn(narrow);
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
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
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
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
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

struct Level {
  int height, width;
  int start;  // its first token
  int lists;  // its first list: see deform_attn_backward.cuh
};

struct Problem {
  int batch, tokens, heads, dim, queries, levels, points, samples;  // samples = levels * points
  int box;              // coordinates of a reference, 2 or 4; 0: places are locations, not offsets
  int lists;            // of one head of one image
  unsigned reciprocal;  // of points: see level_of
  int tiles;            // of one head of one image
  int tile_columns_log2, tile_rows_log2;
  bool pyramid;    // queries are the cells of the pyramid, so tiles are rectangles of it
  Numbers places;  // (B, Q, M, L, P, 2): locations as fractions of a level, or raw offsets
  Numbers weights;  // (B, Q, M, L, P): as they are, or logits where places are offsets
  Numbers reference;  // (B, Q, L, box)
  Level level[kMaxLevels];
};

// sample / points without a division; exact while samples * points < 2^32.
__device__ __forceinline__ int level_of(const Problem& problem, int sample) {
  return problem.points == 1 ? sample : static_cast<int>(__umulhi(sample, problem.reciprocal));
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

// Where `place`, a location or an offset, lies. `row` is image * Q + query.
//
// Kernels that count, list and weigh samples must agree to the last bit on the cell, so no sum of products is left for
// the compiler to contract in one kernel and not in another.
template <typename A>
__device__ __forceinline__ Sample<A> locate(const Problem& problem, const Level& level, int l, int row, Pair<A> place) {
  Sample<A> s;
  s.unit_x = static_cast<A>(level.width), s.unit_y = static_cast<A>(level.height);
  Pair<A> zero{static_cast<A>(-0.5), static_cast<A>(-0.5)};  // centres of cells have whole coordinates
  if (problem.box) {
    const int reference = (row * problem.levels + l) * (problem.box / 2);
    const Pair<A> centre = read_pair<A>(problem.reference, reference);
    zero.x = fused_multiply_add(centre.x, s.unit_x, zero.x), zero.y = fused_multiply_add(centre.y, s.unit_y, zero.y);
    if (problem.box == 2) {
      s.unit_x = s.unit_y = static_cast<A>(1);
    } else {
      const Pair<A> size = read_pair<A>(problem.reference, reference + 1);
      const A half = static_cast<A>(0.5) / static_cast<A>(problem.points);
      s.unit_x *= size.x * half, s.unit_y *= size.y * half;
    }
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

// ---- Reductions among groups of SIZE neighbouring lanes; all lanes of the warp take part.

template <int SIZE, typename A>
__device__ __forceinline__ A sum_lanes(A x) {
#pragma unroll
  for (int bit = SIZE / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

template <int SIZE, typename A>
__device__ __forceinline__ A max_lanes(A x) {
#pragma unroll
  for (int bit = SIZE / 2; bit > 0; bit /= 2) x = largest(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
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
  tile.head = image_and_head % problem.heads, tile.image = image_and_head / problem.heads;
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
