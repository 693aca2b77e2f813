// Multi-scale deformable attention on CUDA devices: the operators of the library `dino`, which deform_attn.cpp
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
#include <vector>

#include "deform_attn.h"
#include "deform_attn_backward.cuh"
#include "deform_attn_forward.cuh"

namespace {

using namespace dino;

// A tile of queries where they are the cells of the pyramid: 16 x 8. Twice as many would be read from the nearest cache
// a little more often, but the last blocks of a launch would leave more of the device idle.
constexpr int kTileColumnsLog2 = 4, kTileRowsLog2 = 3;

// Lists pay where they are long: below this number of samples for each list, adding atomically moves less memory.
constexpr int64_t kSamplesPerList = 4;

// Lists are made for as many images at a time as have this many samples together (16 bytes each, 64 MiB), so that
// they, the gradient rows and the sums of these images can stay in the second-level cache.
constexpr int64_t kEntriesAtATime = int64_t{1} << 22;

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
    if (dim == 32) return function(std::integral_constant<int, 32>{}), true;
    if (dim == 64) return function(std::integral_constant<int, 64>{}), true;
  }
  return false;
}

// ---- The problem

Problem problem_of(const Sizes& sizes, const std::vector<int64_t>& shapes, const Tensor& places, const Tensor& weights,
                   const std::optional<Tensor>& reference) {
  require(sizes.levels <= kMaxLevels, "there are ", sizes.levels, " levels; CUDA kernels take at most ", kMaxLevels);
  const int64_t samples = sizes.levels * sizes.points;
  require(samples * std::max<int64_t>(sizes.points, 1) < int64_t{1} << 31, "too many points");
  Problem p{};
  p.batch = sizes.batch, p.tokens = sizes.tokens, p.heads = sizes.heads, p.dim = sizes.dim;
  p.queries = sizes.queries, p.levels = sizes.levels, p.points = sizes.points, p.samples = samples, p.box = sizes.box;
  if (p.points > 1) p.reciprocal = ((int64_t{1} << 32) + p.points - 1) / p.points;
  p.places = numbers_of(places), p.weights = numbers_of(weights);
  if (reference) p.reference = numbers_of(*reference);
  int64_t start = 0, lists = 0;
  for (int l = 0; l < p.levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    p.level[l] = {static_cast<int>(height), static_cast<int>(width), static_cast<int>(start), static_cast<int>(lists)};
    start += height * width, lists += (height + 1) * (width + 1);
    require(lists * std::max<int64_t>(sizes.heads, 1) < int64_t{1} << 31, "the levels have too many cells");
  }
  p.lists = lists;
  return p;
}

// Rectangles where queries are the cells of the pyramid, otherwise as many consecutive queries as a block has slots.
void cut_into_tiles(Problem& p, int slots) {
  p.pyramid = p.queries == p.tokens;
  p.tile_columns_log2 = kTileColumnsLog2, p.tile_rows_log2 = kTileRowsLog2;
  if (p.pyramid) {
    p.tiles = 0;
    for (int l = 0; l < p.levels; ++l) {
      const Level& level = p.level[l];
      p.tiles += blocks_for(level.height, 1 << kTileRowsLog2) * blocks_for(level.width, 1 << kTileColumnsLog2);
    }
  } else {
    p.tile_rows_log2 = p.tile_columns_log2 = 0;
    while (1 << p.tile_columns_log2 < slots) ++p.tile_columns_log2;
    p.tiles = blocks_for(p.queries, slots);
  }
}

int64_t slots_of(const Problem& p) { return static_cast<int64_t>(p.batch) * p.queries * p.heads; }

// ---- Forward

template <typename T>
void forward_of_type(const Tensor& value, Problem p, const Tensor& output, cudaStream_t stream) {
  const T* from = pointer<const T>(value);
  T* to = pointer<T>(output);
  const bool done = with_packets<T>(p.dim, [&](auto dim) {
    if constexpr (sizeof(T) <= sizeof(float)) {
      constexpr int kDim = decltype(dim)::value;
      cut_into_tiles(p, kForwardThreads * Packet<T>::kSize / kDim);
      const int64_t blocks = static_cast<int64_t>(p.batch) * p.heads * p.tiles;
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
  const Problem p = problem_of(sizes, shapes, places, weights, reference);
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
  bool listed, deterministic;
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
    const int64_t samples = static_cast<int64_t>(p.queries) * p.heads * p.samples;  // of an image
    const int at_a_time = listed ? std::clamp<int64_t>(kEntriesAtATime / samples, 1, p.batch) : p.batch;
    for (int image = 0; image < p.batch; image += at_a_time) {
      const Backward some = part(image, std::min(at_a_time, p.batch - image));
      if (listed) {
        some.by_lists();
      } else {
        some.by_queries({});
      }
    }
  }

  void by_lists() const {
    const int64_t samples = slots_of(p) * p.samples, number = static_cast<int64_t>(p.batch) * p.heads * p.lists;
    require(number < (int64_t{1} << 31) - 1, "the levels have too many cells");
    const Tensor count = torch::stable::new_zeros(like, std::vector<int64_t>{number + 1}, ScalarType::Int);
    const Tensor end = torch::stable::new_empty(like, std::vector<int64_t>{number}, ScalarType::Int);
    const Tensor entries = scratch<A>(like, 4 * samples);
    const Lists<A> lists{pointer<int>(count), pointer<int>(end), pointer<Entry<A>>(entries)};
    launch(count_samples<A>, blocks_for(samples, kListThreads), kListThreads, 0, stream, p, lists.count);
    launch(place_lists, blocks_for(number, kListThreads), kListThreads, 0, stream, lists.count,
           static_cast<int>(number), lists.end, lists.count + number);
    by_queries(lists);
    if (deterministic) {
      launch(sort_lists<A>, blocks_for(number, kWarpsOfLists), kListThreads, 0, stream, lists,
             static_cast<int>(number));
    }
    for (int odd = 0; odd < 4; ++odd) sum_lists(lists, odd / 2, odd % 2);
  }

  void sum_lists(const Lists<A>& lists, int odd_rows, int odd_columns) const {
    int64_t blocks = 0;
    for (int l = 0; l < p.levels; ++l) {
      const int64_t rows = p.batch * p.heads * static_cast<int64_t>(of_parity(p.level[l].height + 1, odd_rows));
      const int64_t columns = of_parity(p.level[l].width + 1, odd_columns);
      blocks += rows * blocks_for(columns, kWarpsOfLists * lists_of_warp(rows * columns));
    }
    const bool done = with_packets<T>(p.dim, [&](auto dim) {
      if constexpr (sizeof(T) <= sizeof(float)) {
        launch(sum_lists_packets<T, decltype(dim)::value>, blocks, kListThreads, 0, stream, p, grad, lists, sums,
               result, odd_rows, odd_columns);
      }
    });
    if (!done) launch(sum_lists_any<T>, blocks, kListThreads, 0, stream, p, grad, lists, sums, odd_rows, odd_columns);
  }

  void by_queries(const Lists<A>& lists) const {
    bool done = false;
    if (!gradients.scratch) {
      done = with_packets<T>(p.dim, [&](auto dim) {
        if constexpr (sizeof(T) <= sizeof(float)) by_packets<decltype(dim)::value>(lists);
      });
    }
    if (!done) {
      launch(backward_any<T>, blocks_for(slots_of(p), 4), 4 * kWarp, 0, stream, p, grad, value, gradients,
             listed ? nullptr : sums, lists);
    }
  }

  template <int D>
  void by_packets(const Lists<A>& lists) const {
    constexpr int kSlots = kBackwardThreads * Packet<T>::kSize / D;
    Problem tiled = p;
    cut_into_tiles(tiled, kSlots);
    const auto run = [&](auto kernel, size_t shared) {
      launch(kernel, static_cast<int64_t>(p.batch) * p.heads * tiled.tiles, kBackwardThreads, shared, stream, tiled,
             grad, value, gradients, sums, lists);
    };
    if (p.box) {
      const size_t shared = kept_bytes(p);
      listed ? run(backward_packets<T, D, true, true>, shared) : run(backward_packets<T, D, true, false>, shared);
    } else {
      listed ? run(backward_packets<T, D, false, true>, 0) : run(backward_packets<T, D, false, false>, 0);
    }
  }

  // Shared memory of backward_packets in the fused form.
  static size_t kept_bytes(const Problem& p) {
    return kBackwardThreads * (16 / sizeof(T)) / p.dim * p.samples * sizeof(float4);
  }

  static bool has_packets(const Problem& p) {
    return with_packets<T>(p.dim, [](auto) {}) && (!p.box || kept_bytes(p) <= kKeptBytes);
  }
};

template <typename T>
void backward_of_type(const Tensor& grad, const Tensor& value, const Problem& p, bool deterministic, Results& results,
                      const std::optional<Tensor>& reference) {
  using A = typename Accumulator<T>::type;
  const int64_t lists = static_cast<int64_t>(p.batch) * p.heads * p.lists, samples = slots_of(p) * p.samples;
  const bool listed = deterministic || samples >= kSamplesPerList * lists, packets = Backward<T>::has_packets(p);
  constexpr bool kHalf = sizeof(T) < sizeof(float);
  const ScalarType type = sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  // Sums of a half type are kept in float. Only sum_lists_packets writes the result itself.
  const bool separate = kHalf && listed && with_packets<T>(p.dim, [](auto) {});
  const Tensor sums = listed ? torch::stable::new_empty(value, sizes_of(value), type)
                             : torch::stable::new_zeros(value, sizes_of(value), type);
  const Tensor result = separate ? torch::stable::new_empty(value, sizes_of(value)) : sums;

  Gradients<A> gradients{numbers_of(results.places), numbers_of(results.weights), nullptr, nullptr};
  std::optional<Tensor> by_heads, weight_gradients;
  if (reference) {
    by_heads = scratch<A>(value, slots_of(p) * p.levels * 4);
    gradients.reference = pointer<A>(*by_heads);
    if (!packets) {
      weight_gradients = scratch<A>(value, samples);
      gradients.scratch = pointer<A>(*weight_gradients);
    }
  }
  const cudaStream_t stream = current_stream(value);
  const Backward<T> backward{p,      pointer<const T>(grad), pointer<const T>(value), gradients,     pointer<A>(sums),
                             pointer<T>(result), listed,     deterministic,           value,         stream};
  backward.run();
  results.value = kHalf && !separate ? torch::stable::to(sums, value.scalar_type()) : result;
  if (reference) {
    launch(sum_heads<A>, blocks_for(reference->numel(), kListThreads), kListThreads, 0, stream, p,
           static_cast<const A*>(gradients.reference), numbers_of(results.reference));
  }
}

Results backward(const Sizes& sizes, const Tensor& grad_, const Tensor& value_, const std::vector<int64_t>& shapes,
                 const Tensor& places_, const Tensor& weights_, const std::optional<Tensor>& reference_,
                 bool deterministic) {
  check_gradient(grad_, value_, sizes);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  if (grad_.numel() == 0 || places_.numel() == 0) {
    const Tensor reference = reference_ ? zeros_like(*reference_) : value_;
    return {zeros_like(value_), zeros_like(places_), zeros_like(weights_), reference};
  }
  const Tensor grad = dense(grad_), value = dense(value_), places = dense(places_), weights = dense(weights_);
  std::optional<Tensor> reference;
  if (reference_) reference = dense(*reference_);
  const Problem p = problem_of(sizes, shapes, places, weights, reference);
  Results results{value, torch::stable::new_empty(places, sizes_of(places)),
                  torch::stable::new_empty(weights, sizes_of(weights)),
                  reference ? torch::stable::new_empty(*reference, sizes_of(*reference)) : value};
  with_type_of(value, [&](auto zero) {
    backward_of_type<decltype(zero)>(grad, value, p, deterministic, results, reference);
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
  const Results results = backward(sizes, grad, value, shapes, locations, weights, std::nullopt, DETERMINISTIC);
  return {results.value, results.places, results.weights};
}

Tensor deform_attn_fused_forward(const Tensor& value, const Shapes& shapes, const Tensor& offsets, const Tensor& logits,
                                 const Tensor& reference) {
  return forward(check_fused(value, shapes, offsets, logits, reference), value, shapes, offsets, logits, reference);
}

template <bool DETERMINISTIC>
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_attn_fused_backward(const Tensor& grad, const Tensor& value,
                                                                      const Shapes& shapes, const Tensor& offsets,
                                                                      const Tensor& logits, const Tensor& reference) {
  const Sizes sizes = check_fused(value, shapes, offsets, logits, reference);
  const Results results = backward(sizes, grad, value, shapes, offsets, logits, reference, DETERMINISTIC);
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
