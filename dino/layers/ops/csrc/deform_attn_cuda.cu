// Multi-scale deformable attention on CUDA devices: the operators of the library `dino`, which deform_attn_schema.cpp
// declares. The kernels are in the .cuh files; this file checks arguments, chooses kernels and launches them.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "deform_attn.h"
#include "deform_attn_backward.cuh"
#include "deform_attn_deterministic.cuh"
#include "deform_attn_forward.cuh"
#include "deform_attn_tiles.cuh"

namespace {

using namespace dino;

// Tiles of queries where they are the cells of the pyramid. Forward reads tokens in the nearest cache, which holds what
// a few small tiles read; backward sorts the samples of a tile, which pays the more there are.
constexpr int kForwardColumnsLog2 = 3, kForwardRowsLog2 = 3, kTileColumnsLog2 = 4, kTileRowsLog2 = 3;

// Lists are made for as many images at a time as have this many samples together (20 bytes each, 80 MiB).
constexpr int64_t kEntriesAtATime = int64_t{1} << 22;

// A list should not be shorter than this: it is counted and placed, too.
constexpr int64_t kSamplesOfList = 4;

// Shared memory that a kernel gets without asking.
constexpr size_t kSharedBytes = 48 << 10;

// Shared memory for what backward keeps of all samples of a slot in the fused form; 8 KiB are left for the rest.
constexpr size_t kKeptBytes = 40 << 10;

// ---- Tensors

// Contiguous, at an address that packets of 16 bytes can be loaded from.
Tensor dense(const Tensor& x) {
  const Tensor y = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? torch::stable::clone(y) : y;
}

size_t size_of(Kind kind) { return kind == Kind::kDouble ? 8 : kind == Kind::kFloat ? 4 : 2; }

Numbers numbers_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const Kind kind = type == ScalarType::Float    ? Kind::kFloat
                    : type == ScalarType::Double ? Kind::kDouble
                    : type == ScalarType::Half   ? Kind::kHalf
                                                 : Kind::kBFloat16;
  return {const_cast<void*>(x.const_data_ptr()), kind};
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

Tensor nothing_like(const Tensor& x) { return torch::stable::new_empty(x, std::vector<int64_t>{0}); }

Tensor zeros_like(const Tensor& x) { return torch::stable::new_zeros(x, sizes_of(x)); }

template <typename A>
Tensor scratch(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, std::vector<int64_t>{size},
                                  sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float);
}

template <typename A>
A* pointer(const Tensor& x) {
  return static_cast<A*>(const_cast<void*>(x.const_data_ptr()));
}

// ---- Launches

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  require(error == 0, "CUDA device ", x.get_device_index(), " has no current stream");
  return static_cast<cudaStream_t>(stream);
}

int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  require(blocks < int64_t{1} << 31, "too much work for one launch: split the batch");
  if (shared > kSharedBytes) {
    const int bytes = static_cast<int>(shared);
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == 0,
            "a kernel can't have ", bytes, " bytes of shared memory");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls function(T{}) with the C++ type of `value`.
template <typename Function>
void with_type_of(const Tensor& value, const Function& function) {
  switch (value.scalar_type()) {
    case ScalarType::Float: return function(float{});
    case ScalarType::Double: return function(double{});
    case ScalarType::Half: return function(__half{});
    default: return function(__nv_bfloat16{});
  }
}

// Calls function(dimension) with D as a constant if there are kernels for packets of this type and head dimension.
template <typename T, typename Function>
bool with_packets(int dim, const Function& function) {
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (dim == 16) return function(std::integral_constant<int, 16>{}), true;
    if (dim == 32) return function(std::integral_constant<int, 32>{}), true;
    if (dim == 64) return function(std::integral_constant<int, 64>{}), true;
    if (dim == 128) return function(std::integral_constant<int, 128>{}), true;
  }
  return false;
}

// ---- The problem

Division division_by(int64_t x) {
  int bits = 0;
  while (int64_t{1} << bits < x) ++bits;
  if (bits == 0) return {0, 0};
  return {static_cast<unsigned>((int64_t{1} << (31 + bits)) / x + 1), bits - 1};
}

// As many lists for a cell as keep them short, if the samples lie evenly.
int copies_log2(int64_t samples, int64_t cells) {
  int log2 = 0;
  while (1 << log2 < kMaxCopies && samples >= cells * kSamplesOfList << (log2 + 1)) ++log2;
  return log2;
}

Problem problem_of(const Sizes& sizes, const std::vector<int64_t>& shapes, const Tensor& value, const Tensor& places,
                   const Tensor& weights, const std::optional<Tensor>& reference) {
  require(sizes.levels <= kMaxLevels, "there are ", sizes.levels, " levels; CUDA kernels take at most ", kMaxLevels);
  const int64_t samples = sizes.levels * sizes.points;
  require(samples * std::max<int64_t>(sizes.points, 1) < int64_t{1} << 31, "too many points");
  Problem p{};
  p.batch = sizes.batch, p.tokens = sizes.tokens, p.heads = sizes.heads, p.dim = sizes.dim;
  p.queries = sizes.queries, p.levels = sizes.levels, p.points = sizes.points, p.samples = samples, p.box = sizes.box;
  p.by_points = division_by(p.points), p.by_samples = division_by(samples);
  p.by_heads = division_by(p.heads), p.by_queries = division_by(p.queries);
  p.places = numbers_of(places), p.weights = numbers_of(weights);
  p.uniform = p.places.kind == p.weights.kind && p.places.kind == numbers_of(value).kind;
  if (reference) p.reference = numbers_of(*reference);
  int64_t start = 0, lists = 0;
  for (int l = 0; l < p.levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    const int64_t cells = (height + 1) * (width + 1);
    const int copies = copies_log2(sizes.queries * sizes.points, cells);
    p.level[l] = {static_cast<int>(height), static_cast<int>(width), static_cast<int>(start), static_cast<int>(lists),
                  copies};
    start += height * width, lists += blocks_for(cells << copies, kMaxCopies) * kMaxCopies;
    require(lists * std::max<int64_t>(sizes.heads, 1) < int64_t{1} << 31, "the levels have too many cells");
  }
  p.lists = lists;
  return p;
}

// Rectangles of the pyramid, whose cells the queries are.
void cut_into_rectangles(Problem& p, int columns_log2, int rows_log2) {
  p.pyramid = true;
  p.tile_columns_log2 = columns_log2, p.tile_rows_log2 = rows_log2, p.tiles = 0;
  for (int l = 0; l < p.levels; ++l) {
    const Level& level = p.level[l];
    p.tiles += blocks_for(level.height, 1 << rows_log2) * blocks_for(level.width, 1 << columns_log2);
  }
}

// Rectangles where queries are the cells of the pyramid, otherwise as many consecutive queries as a block has slots.
void cut_into_tiles(Problem& p, int slots) {
  if (p.queries == p.tokens) return cut_into_rectangles(p, kForwardColumnsLog2, kForwardRowsLog2);
  p.pyramid = false;
  p.tile_rows_log2 = p.tile_columns_log2 = 0;
  while (1 << p.tile_columns_log2 < slots) ++p.tile_columns_log2;
  p.tiles = blocks_for(p.queries, slots);
}

int64_t slots_of(const Problem& p) { return static_cast<int64_t>(p.batch) * p.queries * p.heads; }

// ---- Forward

// Log2 of the heads whose rows of some bytes lie in one line of a cache, 128 bytes.
int heads_of_line(int heads, size_t bytes) {
  int log2 = 0;
  while (bytes << (log2 + 1) <= 128 && heads % (1 << (log2 + 1)) == 0) ++log2;
  return log2;
}

template <typename T>
void forward_of_type(const Tensor& value, Problem p, const Tensor& output, cudaStream_t stream) {
  const T* from = pointer<const T>(value);
  T* to = pointer<T>(output);
  const bool done = with_packets<T>(p.dim, [&](auto dim) {
    if constexpr (sizeof(T) <= sizeof(float)) {
      constexpr int kDim = decltype(dim)::value;
      p.heads_log2 = heads_of_line(p.heads, kDim * sizeof(T));
      cut_into_tiles(p, (kForwardThreads * Packet<T>::kSize / kDim) >> p.heads_log2);
      const int64_t blocks = static_cast<int64_t>(p.batch) * (p.heads >> p.heads_log2) * p.tiles;
      if (p.box) {
        launch(forward_packets<T, kDim, true>, blocks, kForwardThreads, 0, stream, p, from, to);
      } else {
        launch(forward_packets<T, kDim, false>, blocks, kForwardThreads, 0, stream, p, from, to);
      }
    }
  });
  if (!done) launch(forward_any<T>, blocks_for(slots_of(p), 8), 8 * kWarp, 0, stream, p, from, to);
}

Tensor forward(const Sizes& sizes, const Tensor& value_, const std::vector<int64_t>& shapes, const Tensor& places_,
               const Tensor& weights_, const std::optional<Tensor>& reference_) {
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  const std::vector<int64_t> size{sizes.batch, sizes.queries, sizes.heads * sizes.dim};
  const Tensor output = torch::stable::new_empty(value_, size);
  require(output.numel() < int64_t{1} << 31, "the result would have 2^31 elements or more: split the batch");
  if (output.numel() == 0) return output;
  if (places_.numel() == 0) return torch::stable::new_zeros(value_, size);
  const Tensor value = dense(value_), places = dense(places_), weights = dense(weights_);
  std::optional<Tensor> reference;
  if (reference_) reference = dense(*reference_);
  const Problem p = problem_of(sizes, shapes, value, places, weights, reference);
  with_type_of(value, [&](auto zero) { forward_of_type<decltype(zero)>(value, p, output, current_stream(value)); });
  return output;
}

// ---- Backward

struct Results {
  Tensor value, places, weights, reference;
};

template <typename T>
struct Backward {
  using A = typename Accumulator<T>::type;

  Problem p;  // of all images; below, `part` is that of some of them
  const T *grad, *value;
  Gradients<A> gradients;
  A* sums;
  T* result;
  int tile_rows;  // log2, for backward_tiles; -1: not by tiles
  bool packets, deterministic;
  const Tensor& like;
  cudaStream_t stream;

  // The same for `count` images from `image` on.
  Backward part(int image, int count) const {
    Backward some = *this;
    const auto skip = [image](Numbers& numbers, int64_t per_image) {
      if (numbers.data) numbers.data = static_cast<char*>(numbers.data) + image * per_image * size_of(numbers.kind);
    };
    const int64_t tokens = static_cast<int64_t>(p.tokens) * p.heads * p.dim;
    const int64_t slots = static_cast<int64_t>(p.queries) * p.heads;
    some.p.batch = count;
    skip(some.p.places, slots * p.samples * 2), skip(some.gradients.places, slots * p.samples * 2);
    skip(some.p.weights, slots * p.samples), skip(some.gradients.weights, slots * p.samples);
    skip(some.p.reference, static_cast<int64_t>(p.queries) * p.levels * p.box);
    some.grad += image * slots * p.dim, some.value += image * tokens;
    some.sums += image * tokens, some.result += image * tokens;
    if (gradients.reference) some.gradients.reference += image * slots * p.levels * 4;
    if (gradients.scratch) some.gradients.scratch += image * slots * p.samples;
    return some;
  }

  void run() const {
    if (tile_rows >= 0) {
      by_tiles();
    } else {
      by_queries();
    }
    if (!deterministic) return;
    const int64_t samples = static_cast<int64_t>(p.queries) * p.heads * p.samples;  // of an image
    const int at_a_time = std::clamp<int64_t>(kEntriesAtATime / samples, 1, p.batch);
    for (int image = 0; image < p.batch; image += at_a_time) {
      part(image, std::min(at_a_time, p.batch - image)).by_lists();
    }
  }

  // The gradient of the values, from lists of all samples that are in the same order in each run.
  void by_lists() const {
    const int64_t samples = slots_of(p) * p.samples, number = static_cast<int64_t>(p.batch) * p.heads * p.lists;
    require(number < (int64_t{1} << 31) - kListThreads, "the levels have too many cells");
    const Tensor counted = torch::stable::new_zeros(like, std::vector<int64_t>{number + 1}, ScalarType::Int);
    const Tensor placed = torch::stable::new_empty(like, std::vector<int64_t>{number + samples}, ScalarType::Int);
    const Tensor entries = scratch<A>(like, 4 * samples);
    int *const count = pointer<int>(counted), *const end = pointer<int>(placed);
    const Lists<A> lists{count, end, count + number, end + number, pointer<Entry<A>>(entries)};
    launch(rank_samples<A>, blocks_for(samples, kListThreads * kRankedByThread), kListThreads, 0, stream, p, lists);
    launch(place_lists<A>, blocks_for(number, kListThreads), kListThreads, 0, stream, lists, static_cast<int>(number));
    launch(write_entries<A>, blocks_for(slots_of(p), kListThreads / kSlotLanes), kListThreads, 0, stream, p, lists);
    launch(sort_lists<A>, blocks_for(number, kWarpsOfLists), kListThreads, 0, stream, lists, static_cast<int>(number));
    for (int odd = 0; odd < 4; ++odd) sum_lists(lists, odd / 2, odd % 2);
  }

  void sum_lists(const Lists<A>& lists, int odd_rows, int odd_columns) const {
    int64_t blocks = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int64_t rows = p.batch * p.heads * static_cast<int64_t>(of_parity(p.level[l].height + 1, odd_rows));
      const int64_t columns = of_parity(p.level[l].width + 1, odd_columns);
      blocks += rows * blocks_for(columns, kWarpsOfLists * cells_of_warp(rows * columns));
    }
    const bool done = sums_packets(p.dim) && with_packets<T>(p.dim, [&](auto dim) {
      if constexpr (sizeof(T) <= sizeof(float) && decltype(dim)::value > 16) {
        launch(sum_lists_packets<T, decltype(dim)::value>, blocks, kListThreads, 0, stream, p, grad, lists, sums,
               result, odd_rows, odd_columns);
      }
    });
    if (!done) launch(sum_lists_any<T>, blocks, kListThreads, 0, stream, p, grad, lists, sums, odd_rows, odd_columns);
  }

  // Whether sum_lists writes the result itself.
  static bool sums_packets(int dim) { return dim > 16 && with_packets<T>(dim, [](auto) {}); }

  void by_tiles() const {
    with_packets<T>(p.dim, [&](auto dim) {
      if constexpr (sizeof(T) <= sizeof(float)) {
        constexpr int kDim = decltype(dim)::value;
        Problem some = p;
        cut_into_rectangles(some, kTileColumnsLog2, tile_rows);
        const int queries = 1 << (some.tile_columns_log2 + some.tile_rows_log2);
        const size_t bytes = tile_bytes(queries, p.samples, kDim * sizeof(T));
        const auto run = [&](auto kernel) {
          launch(kernel, static_cast<int64_t>(p.batch) * p.heads * some.tiles, kTileThreads, bytes, stream, some, grad,
                 value, gradients, sums);
        };
        if (p.box) {
          deterministic ? run(backward_tiles<T, kDim, true, false>) : run(backward_tiles<T, kDim, true, true>);
        } else {
          deterministic ? run(backward_tiles<T, kDim, false, false>) : run(backward_tiles<T, kDim, false, true>);
        }
      }
    });
  }

  void by_queries() const {
    bool done = false;
    if (packets && !deterministic) {
      done = with_packets<T>(p.dim, [&](auto dim) {
        if constexpr (sizeof(T) <= sizeof(float)) by_packets<decltype(dim)::value>();
      });
    }
    if (!done) {
      launch(backward_any<T>, blocks_for(slots_of(p), 4), 4 * kWarp, 0, stream, p, grad, value, gradients,
             deterministic ? nullptr : sums);
    }
  }

  template <int D>
  void by_packets() const {
    Problem some = p;
    cut_into_tiles(some, kBackwardThreads * Packet<T>::kSize / D);
    const auto run = [&](auto kernel, size_t shared) {
      launch(kernel, static_cast<int64_t>(p.batch) * p.heads * some.tiles, kBackwardThreads, shared, stream, some, grad,
             value, gradients, sums);
    };
    p.box ? run(backward_packets<T, D, true>, kept_bytes(p)) : run(backward_packets<T, D, false>, 0);
  }

  // Shared memory of backward_packets in the fused form.
  static size_t kept_bytes(const Problem& p) {
    return kBackwardThreads * (16 / sizeof(T)) / p.dim * p.samples * sizeof(float4);
  }

  static bool has_packets(const Problem& p) {
    return with_packets<T>(p.dim, [](auto) {}) && (!p.box || kept_bytes(p) <= kKeptBytes);
  }

  // Rows of the largest tile, at most 8, that backward_tiles has memory for; -1 if there is none.
  static int tile_rows_log2(const Problem& p, int device) {
    if (p.queries != p.tokens || !with_packets<T>(p.dim, [](auto) {})) return -1;
    int bytes = 0, rows = kTileRowsLog2;
    require(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == 0,
            "CUDA device ", device, " does not tell its memory");
    const auto fits = [&] {
      const int queries = 1 << (kTileColumnsLog2 + rows);
      return static_cast<int64_t>(queries) * p.samples <= kMostTileSamples &&
             tile_bytes(queries, p.samples, p.dim * sizeof(T)) <= static_cast<size_t>(bytes);
    };
    while (rows >= 0 && !fits()) --rows;
    return rows;
  }
};

template <typename T>
void backward_of_type(const Tensor& grad, const Tensor& value, const Problem& p, bool deterministic, Results& results) {
  using A = typename Accumulator<T>::type;
  const int tile_rows = Backward<T>::tile_rows_log2(p, value.get_device_index());
  const bool tiled = tile_rows >= 0, packets = tiled || Backward<T>::has_packets(p);
  constexpr bool kHalf = sizeof(T) < sizeof(float);
  const ScalarType type = sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  // Sums of a half type are kept in float. Only sum_lists_packets writes the result itself.
  const bool separate = kHalf && deterministic && Backward<T>::sums_packets(p.dim);
  const Tensor sums = deterministic ? torch::stable::new_empty(value, sizes_of(value), type)
                                    : torch::stable::new_zeros(value, sizes_of(value), type);
  const Tensor result = separate ? torch::stable::new_empty(value, sizes_of(value)) : sums;

  Gradients<A> gradients{numbers_of(results.places), numbers_of(results.weights), nullptr, nullptr};
  std::optional<Tensor> by_heads, weight_gradients;
  const int64_t by_reference = results.reference.numel();
  if (by_reference) {
    by_heads = scratch<A>(value, slots_of(p) * p.levels * 4);
    gradients.reference = pointer<A>(*by_heads);
  }
  if (p.box && (!packets || (deterministic && !tiled))) {  // for backward_any
    weight_gradients = scratch<A>(value, slots_of(p) * p.samples);
    gradients.scratch = pointer<A>(*weight_gradients);
  }
  const cudaStream_t stream = current_stream(value);
  const Backward<T> backward{p,      pointer<const T>(grad), pointer<const T>(value), gradients, pointer<A>(sums),
                             pointer<T>(result), tile_rows,  packets,                 deterministic, value, stream};
  backward.run();
  results.value = kHalf && !separate ? torch::stable::to(sums, value.scalar_type()) : result;
  if (by_reference) {
    launch(sum_heads<A>, blocks_for(by_reference, kListThreads), kListThreads, 0, stream, p,
           static_cast<const A*>(gradients.reference), numbers_of(results.reference));
  }
}

Results backward(const Sizes& sizes, const Tensor& grad_, const Tensor& value_, const std::vector<int64_t>& shapes,
                 const Tensor& places_, const Tensor& weights_, const std::optional<Tensor>& reference_,
                 bool by_reference, bool deterministic) {
  check_gradient(grad_, value_, sizes);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  if (grad_.numel() == 0 || places_.numel() == 0) {
    const Tensor reference = by_reference ? zeros_like(*reference_) : nothing_like(value_);
    return {zeros_like(value_), zeros_like(places_), zeros_like(weights_), reference};
  }
  const Tensor grad = dense(grad_), value = dense(value_), places = dense(places_), weights = dense(weights_);
  std::optional<Tensor> reference;
  if (reference_) reference = dense(*reference_);
  const Problem p = problem_of(sizes, shapes, value, places, weights, reference);
  Results results{value, torch::stable::new_empty(places, sizes_of(places)),
                  torch::stable::new_empty(weights, sizes_of(weights)),
                  by_reference ? torch::stable::new_empty(*reference, sizes_of(*reference))
                               : nothing_like(reference ? *reference : value)};
  with_type_of(value, [&](auto zero) {
    backward_of_type<decltype(zero)>(grad, value, p, deterministic, results);
  });
  return results;
}

// ---- Operators

using Shapes = std::vector<int64_t>;

Tensor deform_attn_forward(const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  return forward(check_plain(value, shapes, locations, weights), value, shapes, locations, weights, std::nullopt);
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(const Tensor& grad, const Tensor& value, const Shapes& shapes,
                                                        const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = check_plain(value, shapes, locations, weights);
  const Results results = backward(sizes, grad, value, shapes, locations, weights, std::nullopt, false, DETERMINISTIC);
  return {results.value, results.places, results.weights};
}

Tensor deform_attn_fused_forward(const Tensor& value, const Shapes& shapes, const Tensor& offsets, const Tensor& logits,
                                 const Tensor& reference) {
  return forward(check_fused(value, shapes, offsets, logits, reference), value, shapes, offsets, logits, reference);
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_attn_fused_backward(const Tensor& grad, const Tensor& value,
                                                                      const Shapes& shapes, const Tensor& offsets,
                                                                      const Tensor& logits, const Tensor& reference,
                                                                      bool by_reference) {
  const Sizes sizes = check_fused(value, shapes, offsets, logits, reference);
  const Results results =
      backward(sizes, grad, value, shapes, offsets, logits, reference, by_reference, DETERMINISTIC);
  return {results.value, results.places, results.weights, results.reference};
}

}  // namespace

// The stable interface can't tell whether torch.use_deterministic_algorithms is on: Python chooses the operator.
STABLE_TORCH_LIBRARY_IMPL(dino, CUDA, m) {
  m.impl("deform_attn_forward", TORCH_BOX(&deform_attn_forward));
  m.impl("deform_attn_backward", TORCH_BOX(&deform_attn_backward<false>));
  m.impl("deform_attn_backward_deterministic", TORCH_BOX(&deform_attn_backward<true>));
  m.impl("deform_attn_fused_forward", TORCH_BOX(&deform_attn_fused_forward));
  m.impl("deform_attn_fused_backward", TORCH_BOX(&deform_attn_fused_backward<false>));
  m.impl("deform_attn_fused_backward_deterministic", TORCH_BOX(&deform_attn_fused_backward<true>));
}
