// The CPU kernels of deform_attn, written with the vector types of GCC and Clang. A file that includes this one defines
// DINO_KERNELS, the name of its table, and DINO_VECTOR_BYTES, the width of its vectors.
//
// The samples of one (image, query, head) are a slot. `Slot` prepares them all at once, a vector of samples at a time:
// four corner rows as offsets, and bilinear shares that are zero outside the level. Then the rows are gathered with
// vectors of channels. Backward, one call owns all rows of a head, so nothing is added by two threads at once and the
// order of additions is that of the queries.

#pragma once

#include <math.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "deform_attn_cpu.h"

#define DINO_INLINE inline __attribute__((always_inline))

namespace dino {
namespace {

// ---- vectors --------------------------------------------------------------------------------------------------------

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct Lanes<double> {
  using Int = int64_t;
  using Unsigned = uint64_t;
};

template <class A>
struct Simd {
  using Int = typename Lanes<A>::Int;
  using Unsigned = typename Lanes<A>::Unsigned;
  static constexpr int kWidth = DINO_VECTOR_BYTES / sizeof(A);
  typedef A Vector __attribute__((vector_size(DINO_VECTOR_BYTES)));
  typedef Int IntVector __attribute__((vector_size(DINO_VECTOR_BYTES)));
  typedef Unsigned UnsignedVector __attribute__((vector_size(DINO_VECTOR_BYTES)));
  typedef uint16_t HalfVector __attribute__((vector_size(kWidth * 2)));
  typedef double WideVector __attribute__((vector_size(kWidth * 8)));
};

template <class A>
using Vector = typename Simd<A>::Vector;
template <class A>
using IntVector = typename Simd<A>::IntVector;

template <class V, class T>
DINO_INLINE V load(const T* from) {
  static_assert(sizeof(V) % sizeof(T) == 0);
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
DINO_INLINE void store(T* to, V v) {
  memcpy(to, &v, sizeof v);
}

template <class V, class T>
DINO_INLINE V all(T x) {
  return V{} + x;
}

// `a` where either is no number.
template <class V>
DINO_INLINE V largest(V a, V b) {
  return a < b ? b : a;
}

template <class V>
DINO_INLINE V smallest(V a, V b) {
  return b < a ? b : a;
}

// The lanes with these numbers; those of b are counted on from those of a. GCC has Clang's builtin since version 12.
template <int... Number, class V>
DINO_INLINE V pick(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, Number...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{Number...});
#endif
}

template <class V, int... I>
DINO_INLINE V even(V a, V b, std::integer_sequence<int, I...>) {
  return pick<(2 * I)...>(a, b);
}
template <class V, int... I>
DINO_INLINE V odd(V a, V b, std::integer_sequence<int, I...>) {
  return pick<(2 * I + 1)...>(a, b);
}
template <int Half, class V, int... I>
DINO_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kWidth = sizeof...(I);
  return pick<(Half * kWidth / 2 + I / 2 + (I % 2) * kWidth)...>(a, b);
}

// Lanes whose number has the bit `Step` come from b, the others from a; every lane is the sum of two that differ in it.
template <int Step, class V, int... I>
DINO_INLINE V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kWidth = sizeof...(I);
  V straight = pick<((I & Step) ? kWidth + I : I)...>(a, b);
  V crossed = pick<((I & Step) ? kWidth + I - Step : I + Step)...>(a, b);
  return straight + crossed;
}

template <int Step, class V, int... I>
DINO_INLINE V swap_lanes(V a, std::integer_sequence<int, I...>) {
  return pick<(I ^ Step)...>(a, a);
}

// All lanes joined by an operation on two vectors that may take them in any order.
template <class A, int Step = Simd<A>::kWidth / 2, class Join>
DINO_INLINE A fold(Vector<A> v, const Join& join) {
  if constexpr (Step == 0) {
    return v[0];
  } else {
    return fold<A, Step / 2>(join(v, swap_lanes<Step>(v, std::make_integer_sequence<int, Simd<A>::kWidth>())), join);
  }
}

template <class A>
DINO_INLINE A sum_of_lanes(Vector<A> v) {
  return fold<A>(v, [](Vector<A> a, Vector<A> b) { return a + b; });
}

// Sums over the lanes of the vectors leaf(0), leaf(1), ...: lane i of the result belongs to leaf(i).
template <class A, int Step = 1, class Leaf>
DINO_INLINE Vector<A> sum_lanes(const Leaf& leaf, int first = 0) {
  constexpr int kWidth = Simd<A>::kWidth;
  if constexpr (Step == kWidth) {
    return leaf(first);
  } else {
    Vector<A> a = sum_lanes<A, 2 * Step>(leaf, first);
    Vector<A> b = sum_lanes<A, 2 * Step>(leaf, first + Step);
    return add_pairs<Step>(a, b, std::make_integer_sequence<int, kWidth>());
  }
}

// ---- types of elements ----------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
DINO_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// `bits` holds float16 numbers in lanes of 32 bits; works on vectors as on single numbers.
template <class F, class U>
DINO_INLINE F widen_half(U bits) {
  U sign = (bits & 0x8000u) << 16;
  U shifted = (bits & 0x7fffu) << 13;                                      // exponent is now too small by 112
  F magnitude = reinterpret<F>(shifted) * 0x1p112f;                        // right for subnormal numbers, too
  U special = magnitude >= 65536.0f ? U{} + 0x7f800000u : U{} + 0u;        // infinity and not-a-number
  return reinterpret<F>(reinterpret<U>(magnitude) | special | sign);
}

DINO_INLINE float widen(float x) { return x; }
DINO_INLINE double widen(double x) { return x; }
DINO_INLINE float widen(BFloat16 x) { return reinterpret<float>(static_cast<uint32_t>(x.bits) << 16); }
DINO_INLINE float widen(Half x) { return widen_half<float, uint32_t>(x.bits); }

template <class T>
struct Narrow {
  static DINO_INLINE T from(double x) { return static_cast<T>(x); }
  static DINO_INLINE T from(float x) { return static_cast<T>(x); }
};

// Rounded to the nearest, ties to even. A double is first rounded to float.
template <>
struct Narrow<BFloat16> {
  static DINO_INLINE BFloat16 from(float x) {
    uint32_t bits = reinterpret<uint32_t>(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
  }
  static DINO_INLINE BFloat16 from(double x) { return from(static_cast<float>(x)); }
};
template <>
struct Narrow<Half> {
  static DINO_INLINE Half from(float x) {
    uint32_t bits = reinterpret<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    uint32_t subnormal = reinterpret<uint32_t>(reinterpret<float>(bits) + 0.5f) - 0x3f000000u;  // 0.5 ends at 2^-24
    uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t finite = bits < 0x38800000u ? subnormal : normal;
    return {static_cast<uint16_t>(sign | (bits >= 0x47800000u ? special : finite))};
  }
  static DINO_INLINE Half from(double x) { return from(static_cast<float>(x)); }
};

// A vector of channels in the working type.
template <class A>
DINO_INLINE Vector<A> load_row(const A* from) {
  return load<Vector<A>>(from);
}
template <class A>
DINO_INLINE Vector<A> load_row(const BFloat16* from) {
  using S = Simd<A>;
  auto bits = load<typename S::HalfVector>(from);
  return reinterpret<Vector<A>>(__builtin_convertvector(bits, typename S::UnsignedVector) << 16);
}
template <class A>
DINO_INLINE Vector<A> load_row(const Half* from) {
  using S = Simd<A>;
  auto bits = load<typename S::HalfVector>(from);
#if defined(__AVX512F__) && DINO_VECTOR_BYTES == 64
  return reinterpret<Vector<A>>(_mm512_cvtph_ps(reinterpret<__m256i>(bits)));
#elif defined(__F16C__) && DINO_VECTOR_BYTES == 32
  return reinterpret<Vector<A>>(_mm256_cvtph_ps(reinterpret<__m128i>(bits)));
#else
  return widen_half<Vector<A>>(__builtin_convertvector(bits, typename S::UnsignedVector));
#endif
}

template <class T, class A>
void widen_all(const T* from, A* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(widen(from[i]));
}

template <class T, class A>
void narrow_all(const A* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Narrow<T>::from(from[i]);
}

// Calls f with a null pointer of the type that the elements have.
template <class F>
DINO_INLINE void with_type(Kind kind, const F& f) {
  switch (kind) {
    case Kind::kFloat: return f(static_cast<float*>(nullptr));
    case Kind::kDouble: return f(static_cast<double*>(nullptr));
    case Kind::kHalf: return f(static_cast<Half*>(nullptr));
    case Kind::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
  }
}

template <class A>
constexpr Kind kWorking = sizeof(A) == sizeof(float) ? Kind::kFloat : Kind::kDouble;

// Whether elements of an array can be read and written where they are: `multiple` vectors at a time, in the working type.
template <class A>
DINO_INLINE bool in_place(const Array& array, int64_t count, int64_t multiple) {
  return array.kind == kWorking<A> && count % (multiple * Simd<A>::kWidth) == 0;
}

// Elements offset .. offset + count in the working type, where they are or in `buffer`.
template <class A>
DINO_INLINE const A* fetch(const Array& array, int64_t offset, int64_t count, A* buffer, int64_t multiple = 1) {
  if (in_place<A>(array, count, multiple)) return static_cast<const A*>(array.data) + offset;
  with_type(array.kind, [&](auto* type) { widen_all(static_cast<decltype(type)>(array.data) + offset, buffer, count); });
  return buffer;
}

// The way back: where to write the elements, and then, if that is `buffer`, to bring them home.
template <class A>
DINO_INLINE A* destination(const Array& array, int64_t offset, int64_t count, A* buffer, int64_t multiple = 1) {
  return in_place<A>(array, count, multiple) ? static_cast<A*>(array.data) + offset : buffer;
}
template <class A>
DINO_INLINE void deliver(const Array& array, int64_t offset, int64_t count, const A* buffer, int64_t multiple = 1) {
  if (in_place<A>(array, count, multiple)) return;
  with_type(array.kind, [&](auto* type) { narrow_all(buffer, static_cast<decltype(type)>(array.data) + offset, count); });
}

// ---- scratch memory -------------------------------------------------------------------------------------------------

// Hands out aligned pieces of one block. Without a block it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

template <class A>
int64_t padded(int64_t count) {
  return (count + Simd<A>::kWidth - 1) / Simd<A>::kWidth * Simd<A>::kWidth;
}

// ---- samples of a slot ----------------------------------------------------------------------------------------------

// Per sample of a slot, what its level fixes. Rows are counted in elements from the head's first one.
template <class A>
struct Pyramid {
  using Int = typename Lanes<A>::Int;
  int64_t samples, padded_samples;
  Int row;  // elements from one token to the next
  A *width, *height;
  Int *last_column, *last_row, *line, *start;  // line: elements from one row of the level to the next

  void reserve(Arena& arena, const Problem& p) {
    samples = p.levels * p.points;
    padded_samples = padded<A>(samples);
    width = arena.take<A>(padded_samples);
    height = arena.take<A>(padded_samples);
    for (Int** table : {&last_column, &last_row, &line, &start}) *table = arena.take<Int>(padded_samples);
  }

  void fill(const Problem& p, int64_t elements) {
    row = static_cast<Int>(elements);
    int64_t first = 0;
    for (int64_t i = 0; i < padded_samples; ++i) {
      const int64_t level = i < samples ? i / p.points : p.levels - 1;
      const int64_t h = p.shapes[2 * level], w = p.shapes[2 * level + 1];
      width[i] = static_cast<A>(w);
      height[i] = static_cast<A>(h);
      last_column[i] = static_cast<Int>(w - 1);
      last_row[i] = static_cast<Int>(h - 1);
      line[i] = static_cast<Int>(w * elements);
      start[i] = static_cast<Int>(first * elements);
      if (i < samples && (i + 1) % p.points == 0) first += h * w;
    }
  }
};

// One axis of a vector of samples: the two cells beside the sample, and how far it is from the first towards the second.
template <class A>
struct Axis {
  IntVector<A> first, second;      // clamped to the level
  IntVector<A> first_in, second_in;  // all bits set where the cell is in the level
  Vector<A> fraction;
};

// scale * u - cell without the rounding of the product, which at the far end of a level would cost several digits.
template <class A>
DINO_INLINE Vector<A> distance(Vector<A> u, Vector<A> scale, Vector<A> cell) {
#if defined(__FMA__) || defined(__aarch64__)
  return u * scale - cell;  // contracted to one instruction: see -ffp-contract in dino/layers/ops/build.py
#else
  if constexpr (sizeof(A) == sizeof(double)) {
    return u * scale - cell;
  } else {
    using Wide = typename Simd<A>::WideVector;
    Wide exact = __builtin_convertvector(u, Wide) * __builtin_convertvector(scale, Wide);
    return __builtin_convertvector(exact - __builtin_convertvector(cell, Wide), Vector<A>);
  }
#endif
}

// The sample lies at u * scale + shift, in cells.
template <class A>
DINO_INLINE Axis<A> locate(Vector<A> u, Vector<A> scale, Vector<A> shift, IntVector<A> last) {
  using V = Vector<A>;
  using I = IntVector<A>;
  using U = typename Simd<A>::UnsignedVector;
  // Beyond these limits, both cells are outside. No-number becomes -2: what it would be as an integer, no rule says.
  V x = smallest<V>(largest<V>(all<V>(A(-2)), u * scale + shift), scale + A(1));
  I cell = __builtin_convertvector(x, I);
  cell += __builtin_convertvector(cell, V) > x;  // truncated to floor: a true lane is -1
  Axis<A> axis;
  I next = cell + 1;
  axis.first_in = reinterpret<U>(cell) <= reinterpret<U>(last);
  axis.second_in = reinterpret<U>(next) <= reinterpret<U>(last);
  axis.first = largest<I>(smallest<I>(cell, last), I{});
  axis.second = largest<I>(smallest<I>(next, last), I{});
  axis.fraction = distance<A>(u, scale, __builtin_convertvector(cell, V)) + shift;
  return axis;
}

template <class A>
struct Slot {
  using V = Vector<A>;
  using I = IntVector<A>;
  using Int = typename Lanes<A>::Int;
  static constexpr int kWidth = Simd<A>::kWidth;
  Int* offset[4];  // corner rows: (first row, first column), (first, second), (second, first), (second, second)
  A* share[4];     // attention weight * bilinear share
  A *fraction_x, *fraction_y, *attention;
  Int* inside[4];
  A *places, *weights;  // buffers
  A *step_x, *step_y;   // cells per unit of the raw place
  const A* raw;         // places as they were given

  void reserve(Arena& arena, int64_t count) {
    for (Int*& corner : offset) corner = arena.take<Int>(count);
    for (A*& corner : share) corner = arena.take<A>(count);
    for (Int*& corner : inside) corner = arena.take<Int>(count);
    for (A** array : {&fraction_x, &fraction_y, &attention, &weights, &step_x, &step_y}) *array = arena.take<A>(count);
    places = arena.take<A>(2 * count);
    if (arena.base) {
      memset(places, 0, 2 * count * sizeof(A));
      memset(weights, 0, count * sizeof(A));
    }
  }

  // Prepares the slot number `slot`, counted over (B, Q, M).
  template <bool kBackward>
  void prepare(const Problem& p, const Pyramid<A>& pyramid, int64_t slot) {
    const int64_t n = pyramid.samples;
    raw = fetch(p.places, slot * n * 2, n * 2, places, 2);
    const A* given = fetch(p.weights, slot * n, n, weights);
    if (p.box) given = softmax(given, n);
    const A* anchors = static_cast<const A*>(p.anchors) + (p.box ? slot / p.heads * p.box * pyramid.padded_samples : 0);
    for (int64_t i = 0; i < n; i += kWidth) {
      const V a = load<V>(raw + 2 * i), b = load<V>(raw + 2 * i + kWidth);
      const auto lanes = std::make_integer_sequence<int, kWidth>();
      V x = even(a, b, lanes), y = odd(a, b, lanes);
      V shift_x = all<V>(A(-0.5)), shift_y = shift_x;
      V factor_x = load<V>(pyramid.width + i), factor_y = load<V>(pyramid.height + i);
      if (p.box) {
        factor_x = factor_y = all<V>(A(1));
        if (p.box == 4) {
          factor_x = load<V>(anchors + 2 * pyramid.padded_samples + i);
          factor_y = load<V>(anchors + 3 * pyramid.padded_samples + i);
        }
        shift_x += x * factor_x;
        shift_y += y * factor_y;
        x = load<V>(anchors + i);
        y = load<V>(anchors + pyramid.padded_samples + i);
      }
      if constexpr (kBackward) {
        store(step_x + i, factor_x);
        store(step_y + i, factor_y);
      }
      place<kBackward>(pyramid, i, x, y, shift_x, shift_y, load<V>(given + i));
    }
  }

  template <bool kBackward>
  DINO_INLINE void place(const Pyramid<A>& pyramid, int64_t i, V x, V y, V shift_x, V shift_y, V weight) {
    const Axis<A> column = locate<A>(x, load<V>(pyramid.width + i), shift_x, load<I>(pyramid.last_column + i));
    const Axis<A> line = locate<A>(y, load<V>(pyramid.height + i), shift_y, load<I>(pyramid.last_row + i));
    const I elements = load<I>(pyramid.line + i), start = load<I>(pyramid.start + i);
    const I first = start + line.first * elements, second = start + line.second * elements;
    const I left = column.first * pyramid.row, right = column.second * pyramid.row;
    store(offset[0] + i, first + left);
    store(offset[1] + i, first + right);
    store(offset[2] + i, second + left);
    store(offset[3] + i, second + right);
    const V zero = {};
    const V one = all<V>(A(1));
    const V in_left = column.first_in ? one - column.fraction : zero, in_right = column.second_in ? column.fraction : zero;
    const V in_first = line.first_in ? weight * (one - line.fraction) : zero;
    const V in_second = line.second_in ? weight * line.fraction : zero;
    store(share[0] + i, in_first * in_left);
    store(share[1] + i, in_first * in_right);
    store(share[2] + i, in_second * in_left);
    store(share[3] + i, in_second * in_right);
    if constexpr (kBackward) {
      store(inside[0] + i, line.first_in & column.first_in);
      store(inside[1] + i, line.first_in & column.second_in);
      store(inside[2] + i, line.second_in & column.first_in);
      store(inside[3] + i, line.second_in & column.second_in);
      store(fraction_x + i, (column.first_in | column.second_in) ? column.fraction : zero);
      store(fraction_y + i, (line.first_in | line.second_in) ? line.fraction : zero);
      store(attention + i, weight);
    }
  }

  const A* softmax(const A* logits, int64_t n);
};

// e^x for x <= 0; below the smallest normal number it stays there. No-number remains so, but is not made an integer.
DINO_INLINE Vector<float> exponential(Vector<float> x) {
  using V = Vector<float>;
  x = x < -87.0f ? all<V>(-87.0f) : x;
  const V bounded = x < 0.0f ? x : V{};
  IntVector<float> power = __builtin_convertvector(bounded * 1.44269504f - 0.5f, IntVector<float>);
  V whole = __builtin_convertvector(power, V);
  V rest = x - whole * 0.693359375f;  // ln 2 in two parts; the first has few digits, so that the product is exact
  rest = rest + whole * 2.12194440e-4f;
  V sum = all<V>(1.0f / 5040);
  for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + coefficient;
  return sum * reinterpret<V>((power + 127) << 23);
}

DINO_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < Simd<double>::kWidth; ++i) x[i] = exp(x[i]);
  return x;
}

template <class A>
const A* Slot<A>::softmax(const A* logits, int64_t n) {
  // Where n is no whole number of vectors, the logits are in the buffer already, and room follows them.
  for (int64_t i = n; i % kWidth; ++i) weights[i] = logits[0];
  V highest = load<V>(logits);
  for (int64_t i = kWidth; i < n; i += kWidth) highest = largest<V>(highest, load<V>(logits + i));
  const A top = fold<A>(highest, largest<V>);
  for (int64_t i = 0; i < n; i += kWidth) store(weights + i, exponential(load<V>(logits + i) - top));
  for (int64_t i = n; i % kWidth; ++i) weights[i] = 0;
  V sums = {};
  for (int64_t i = 0; i < n; i += kWidth) sums += load<V>(weights + i);
  const A scale = A(1) / sum_of_lanes<A>(sums);
  for (int64_t i = 0; i < n; i += kWidth) store(weights + i, load<V>(weights + i) * scale);
  return weights;
}

// The fused form's places, in cells: anchors 0 and 1 (x, y) * size of the level + offset * step; for boxes, the steps are
// anchors 2 and 3, the P-th part of half a side.
template <class A>
void expand(const Problem& p, int64_t begin, int64_t end) {
  const int64_t n = p.levels * p.points, stride = padded<A>(n);
  for (int64_t query = begin; query < end; ++query) {
    A* anchors = static_cast<A*>(p.anchors) + query * p.box * stride;
    memset(anchors, 0, p.box * stride * sizeof(A));
    for (int64_t level = 0; level < p.levels; ++level) {
      A corners[4];
      const int64_t offset = (query * p.levels + level) * p.box;
      with_type(p.reference.kind, [&](auto* type) {
        widen_all(static_cast<decltype(type)>(p.reference.data) + offset, corners, p.box);
      });
      if (p.box == 4) {
        corners[2] *= static_cast<A>(p.shapes[2 * level + 1]) * A(0.5) / static_cast<A>(p.points);
        corners[3] *= static_cast<A>(p.shapes[2 * level]) * A(0.5) / static_cast<A>(p.points);
      }
      for (int64_t c = 0; c < p.box; ++c)
        for (int64_t point = 0; point < p.points; ++point) anchors[c * stride + level * p.points + point] = corners[c];
    }
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Sum of shares * rows for kCount vectors of channels, from channel 0 of `rows` on.
template <int kCount, class T, class A>
DINO_INLINE void gather(const T* rows, const Slot<A>& slot, int64_t samples, A* out) {
  using V = Vector<A>;
  constexpr int kWidth = Simd<A>::kWidth;
  constexpr int kSums = kCount >= 4 ? 2 : 4;  // independent sums hide the latency of the additions
  V sums[kSums][kCount] = {};
  for (int64_t i = 0; i < samples; ++i) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const V share = all<V>(slot.share[corner][i]);
      const T* row = rows + slot.offset[corner][i];
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) sums[corner % kSums][k] += share * load_row<A>(row + k * kWidth);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) {
    V sum = sums[0][k] + sums[1][k];
    if constexpr (kSums == 4) sum += sums[2][k] + sums[3][k];
    store(out + k * kWidth, sum);
  }
}

template <class T, class A>
DINO_INLINE void gather_all(const T* rows, const Slot<A>& slot, int64_t samples, int64_t dim, A* out) {
  constexpr int kWidth = Simd<A>::kWidth;
  int64_t c = 0;
  for (; c + 4 * kWidth <= dim; c += 4 * kWidth) gather<4>(rows + c, slot, samples, out + c);
  for (; c + 2 * kWidth <= dim; c += 2 * kWidth) gather<2>(rows + c, slot, samples, out + c);
  for (; c < dim; c += kWidth) gather<1>(rows + c, slot, samples, out + c);
}

// Asks for the corner rows of a slot ahead of time, into the second-level cache: it can wait for more rows at once than the
// first, which halved the time on Zen 4.
template <class T, class A>
void prefetch(const T* rows, const Slot<A>& slot, int64_t samples, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < samples; ++i)
    for (const auto* offset : slot.offset)
      for (int64_t c = 0; c < dim; c += kLine) __builtin_prefetch(rows + offset[i] + c, 0, 2);
}

template <class T, class A>
struct Forward {
  Pyramid<A> pyramid;
  Slot<A> slots[2];
  A* out;

  void reserve(Arena& arena, const Problem& p) {
    pyramid.reserve(arena, p);
    for (Slot<A>& slot : slots) slot.reserve(arena, pyramid.padded_samples);
    out = arena.take<A>(padded<A>(p.dim));
  }

  void run(const Problem& p, const Array& result, int64_t begin, int64_t end) {
    pyramid.fill(p, p.pack ? padded<A>(p.dim) : p.heads * p.dim);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t queries = block_queries(p), first = block % query_blocks(p) * queries;
      const int64_t last = first + queries < p.queries ? first + queries : p.queries;
      const int64_t part = block / query_blocks(p);
      if (p.pack) {  // a block belongs to one head, whose rows then stay in the cache
        const int64_t image = part / p.heads, head = part % p.heads;
        for (int64_t query = first; query < last; ++query) {
          const int64_t number = (image * p.queries + query) * p.heads + head;
          slots[0].template prepare<false>(p, pyramid, number);
          finish(p, result, number, static_cast<const A*>(p.packed) + head * p.tokens * padded<A>(p.dim), slots[0]);
        }
      } else {  // it goes over all heads, which lie side by side, and over rows that are hardly in the cache
        scattered(p, result, (part * p.queries + first) * p.heads, (part * p.queries + last) * p.heads);
      }
    }
  }

  void scattered(const Problem& p, const Array& result, int64_t begin, int64_t end) {
    const auto rows = [&](int64_t number) {
      const int64_t image = number / p.heads / p.queries, head = number % p.heads;
      return static_cast<const T*>(p.value.data) + (image * p.tokens * p.heads + head) * p.dim;
    };
    slots[begin % 2].template prepare<false>(p, pyramid, begin);
    for (int64_t number = begin; number < end; ++number) {
      if (number + 1 < end) {
        Slot<A>& next = slots[(number + 1) % 2];
        next.template prepare<false>(p, pyramid, number + 1);
        prefetch(rows(number + 1), next, pyramid.samples, p.dim);
      }
      finish(p, result, number, rows(number), slots[number % 2]);
    }
  }

  template <class Row>
  void finish(const Problem& p, const Array& result, int64_t number, const Row* rows, const Slot<A>& slot) {
    A* sum = destination(result, number * p.dim, p.dim, out);
    gather_all(rows, slot, pyramid.samples, padded<A>(p.dim), sum);
    deliver(result, number * p.dim, p.dim, out);
  }
};

template <class T, class A>
void pack(const Problem& p, int64_t image, int64_t begin, int64_t end) {
  const int64_t dim = padded<A>(p.dim);
  const T* from = static_cast<const T*>(p.value.data) + (image * p.tokens + begin) * p.heads * p.dim;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < p.heads; ++head, from += p.dim) {
      A* to = static_cast<A*>(p.packed) + (head * p.tokens + token) * dim;
      widen_all(from, to, p.dim);
      for (int64_t c = p.dim; c < dim; ++c) to[c] = 0;
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Rows are read from a copy of one head, and sums are made in another, both in the working type.
template <class A>
struct Backward {
  using V = Vector<A>;
  using I = IntVector<A>;
  static constexpr int kWidth = Simd<A>::kWidth;
  Pyramid<A> pyramid;
  Slot<A> slot;
  int64_t dim;
  A *grad, *grad_places, *grad_weights, *cells_x, *cells_y;
  A *value, *sums;  // (S, dim)

  void reserve(Arena& arena, const Problem& p) {
    pyramid.reserve(arena, p);
    slot.reserve(arena, pyramid.padded_samples);
    dim = padded<A>(p.dim);
    grad = arena.take<A>(dim);
    if (arena.base) memset(grad, 0, dim * sizeof(A));
    grad_places = arena.take<A>(2 * pyramid.padded_samples);
    for (A** array : {&grad_weights, &cells_x, &cells_y}) *array = arena.take<A>(pyramid.padded_samples);
    for (A** copy : {&value, &sums}) *copy = arena.take<A>(p.tokens * dim);
  }

  void run(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
    pyramid.fill(p, dim);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t image = part / p.heads, head = part % p.heads;
      const int64_t first = (image * p.tokens * p.heads + head) * p.dim;
      with_type(p.value.kind, [&](auto* type) { take_head(p, static_cast<decltype(type)>(p.value.data) + first); });
      for (int64_t query = 0; query < p.queries; ++query) add_slot(p, g, image, head, query);
      with_type(p.value.kind, [&](auto* type) { return_head(p, static_cast<decltype(type)>(g.value.data) + first); });
    }
  }

  template <class T>
  void take_head(const Problem& p, const T* from) {
    for (int64_t token = 0; token < p.tokens; ++token) {
      widen_all(from + token * p.heads * p.dim, value + token * dim, p.dim);
      for (int64_t c = p.dim; c < dim; ++c) value[token * dim + c] = 0;
    }
    memset(sums, 0, p.tokens * dim * sizeof(A));
  }

  template <class T>
  void return_head(const Problem& p, T* to) {
    for (int64_t token = 0; token < p.tokens; ++token)
      narrow_all(sums + token * dim, to + token * p.heads * p.dim, p.dim);
  }

  void add_slot(const Problem& p, const Gradients& g, int64_t image, int64_t head, int64_t query) {
    const int64_t number = (image * p.queries + query) * p.heads + head, n = pyramid.samples;
    slot.template prepare<true>(p, pyramid, number);
    const A* up = fetch(g.grad, number * p.dim, p.dim, grad);
    A* to_places = destination(g.places, number * n * 2, n * 2, grad_places, 2);
    A* to_weights = destination(g.weights, number * n, n, grad_weights);
    for (int64_t i = 0; i < n; i += kWidth) {
      V dots[4];
      const int64_t left = n - i;
      switch (dim / kWidth) {
        case 1: add_rows<1>(up, i, left, dots); break;
        case 2: add_rows<2>(up, i, left, dots); break;
        case 4: add_rows<4>(up, i, left, dots); break;
        default: add_rows<0>(up, i, left, dots);
      }
      differentiate(i, dots, to_places, to_weights);
    }
    if (p.box) {
      differentiate_softmax(n, to_weights);
    }
    if (g.reference) {
      differentiate_reference(p, static_cast<A*>(g.reference) +
                                     ((image * p.heads + head) * p.queries + query) * p.levels * p.box);
    }
    deliver(g.places, number * n * 2, n * 2, grad_places, 2);
    deliver(g.weights, number * n, n, grad_weights);
  }

  // Adds the shares of `up` to the sums of the corner rows of samples i .. i + kWidth, and multiplies it with those rows.
  // kCount is the number of vectors of a row, or 0 if that is known only now.
  template <int kCount>
  DINO_INLINE void add_rows(const A* up, int64_t i, int64_t left, V* dots) {
    const int64_t count = kCount ? kCount : dim / kWidth;
    V held[kCount ? kCount : 1];
    for (int k = 0; k < kCount; ++k) held[k] = load<V>(up + k * kWidth);
    for (int corner = 0; corner < 4; ++corner) {
      const auto* offset = slot.offset[corner] + i;
      const A* share = slot.share[corner] + i;
      dots[corner] = sum_lanes<A>([&](int lane) __attribute__((always_inline)) {
        V dot = {};
        if (lane >= left) return dot;
        const A* row = value + offset[lane];
        A* sum = sums + offset[lane];
        const V part = all<V>(share[lane]);
#pragma GCC unroll 4
        for (int64_t k = 0; k < count; ++k) {
          const V u = kCount ? held[k] : load<V>(up + k * kWidth);
          dot += u * load<V>(row + k * kWidth);
          store(sum + k * kWidth, load<V>(sum + k * kWidth) + part * u);
        }
        return dot;
      });
    }
  }

  // `dots`: the gradient of the result times the four rows of each sample.
  DINO_INLINE void differentiate(int64_t i, V* dots, A* to_places, A* to_weights) {
    const V zero = {}, x = load<V>(slot.fraction_x + i), y = load<V>(slot.fraction_y + i);
    for (int corner = 0; corner < 4; ++corner) dots[corner] = load<I>(slot.inside[corner] + i) ? dots[corner] : zero;
    const V along_first = dots[1] - dots[0], along_second = dots[3] - dots[2];
    const V first = dots[0] + x * along_first, second = dots[2] + x * along_second;
    const V attention = load<V>(slot.attention + i);
    const V by_x = attention * (along_first + y * (along_second - along_first));
    const V by_y = attention * (second - first);
    store(to_weights + i, first + y * (second - first));
    store(cells_x + i, by_x);
    store(cells_y + i, by_y);
    const V places_x = by_x * load<V>(slot.step_x + i), places_y = by_y * load<V>(slot.step_y + i);
    const auto lanes = std::make_integer_sequence<int, kWidth>();
    store(to_places + 2 * i, interleave<0>(places_x, places_y, lanes));
    store(to_places + 2 * i + kWidth, interleave<1>(places_x, places_y, lanes));
  }

  void differentiate_softmax(int64_t n, A* by_weights) {
    V products = {};  // after the last sample, the attention is zero
    for (int64_t i = 0; i < n; i += kWidth) products += load<V>(slot.attention + i) * load<V>(by_weights + i);
    const A sum = sum_of_lanes<A>(products);
    for (int64_t i = 0; i < n; i += kWidth)
      store(by_weights + i, load<V>(slot.attention + i) * (load<V>(by_weights + i) - sum));
  }

  void differentiate_reference(const Problem& p, A* to) {
    for (int64_t level = 0; level < p.levels; ++level, to += p.box) {
      A x = 0, y = 0, w = 0, h = 0;
      for (int64_t i = level * p.points; i < (level + 1) * p.points; ++i) {
        x += cells_x[i];
        y += cells_y[i];
        w += cells_x[i] * slot.raw[2 * i];
        h += cells_y[i] * slot.raw[2 * i + 1];
      }
      const A width = pyramid.width[level * p.points], height = pyramid.height[level * p.points];
      to[0] = x * width;
      to[1] = y * height;
      if (p.box == 4) {
        to[2] = w * width * A(0.5) / static_cast<A>(p.points);
        to[3] = h * height * A(0.5) / static_cast<A>(p.points);
      }
    }
  }
};

// ---- table ----------------------------------------------------------------------------------------------------------

// Calls f with null pointers of the type of value and of the working type.
template <class F>
DINO_INLINE auto with_types(const Problem& p, const F& f) {
  switch (p.value.kind) {
    case Kind::kDouble: return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case Kind::kHalf: return f(static_cast<Half*>(nullptr), static_cast<float*>(nullptr));
    case Kind::kBFloat16: return f(static_cast<BFloat16*>(nullptr), static_cast<float*>(nullptr));
    default: return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  }
}

template <class T>
using Pointee = std::remove_pointer_t<T>;

int64_t scratch_bytes(const Problem& p, bool backward) {
  return with_types(p, [&](auto* type, auto* working) {
    using T = Pointee<decltype(type)>;
    using A = Pointee<decltype(working)>;
    Arena arena{nullptr};
    if (backward) {
      Backward<A>().reserve(arena, p);
    } else {
      Forward<T, A>().reserve(arena, p);
    }
    return arena.used;
  });
}

void run_expand(const Problem& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto*, auto* working) { expand<Pointee<decltype(working)>>(p, begin, end); });
}

void run_pack(const Problem& p, int64_t image, int64_t begin, int64_t end) {
  with_types(p, [&](auto* type, auto* working) {
    pack<Pointee<decltype(type)>, Pointee<decltype(working)>>(p, image, begin, end);
  });
}

void run_forward(const Problem& p, const Array& out, void* scratch, int64_t begin, int64_t end) {
  with_types(p, [&](auto* type, auto* working) {
    Arena arena{static_cast<char*>(scratch)};
    Forward<Pointee<decltype(type)>, Pointee<decltype(working)>> forward;
    forward.reserve(arena, p);
    forward.run(p, out, begin, end);
  });
}

void run_backward(const Problem& p, const Gradients& gradients, void* scratch, int64_t begin, int64_t end) {
  with_types(p, [&](auto*, auto* working) {
    Arena arena{static_cast<char*>(scratch)};
    Backward<Pointee<decltype(working)>> backward;
    backward.reserve(arena, p);
    backward.run(p, gradients, begin, end);
  });
}

}  // namespace

const Kernels* DINO_KERNELS() {
  static const Kernels kernels = {DINO_KERNELS_NAME, DINO_VECTOR_BYTES, scratch_bytes, run_expand,
                                  run_pack,          run_forward,       run_backward};
  return &kernels;
}

}  // namespace dino
