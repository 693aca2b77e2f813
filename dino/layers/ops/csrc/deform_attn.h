// Multi-scale deformable attention: what its CPU and its CUDA part have in common, the checks of the arguments.
//
// The letters of dino/structures.py: B images, S tokens, M heads, D channels of a head, Q queries, L levels,
// P points. Shapes are flattened: h0, w0, h1, w1, ...
//
//   plain   locations (B, Q, M, L, P, 2) are fractions of a level, weights (B, Q, M, L, P) are used as they are
//   fused   offsets (B, Q, M, L, P, 2) and logits (B, Q, M, L*P) are raw, reference (B, Q, L, 2 or 4) says where from

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace dino {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Sizes {
  int64_t batch, tokens, heads, dim, queries, levels, points;
  int64_t box;  // coordinates of a reference: 2 for points, 4 for boxes; 0 in the plain form
};

// Text without streams: where a compiler links its library of C++ into each shared object, the locales of streams come
// from one copy and their code from another, and the process ends.
inline std::string text(const char* x) { return x; }
inline std::string text(const std::string& x) { return x; }
template <class Number>
inline std::string text(Number x) {
  return std::to_string(x);
}

template <class... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (holds) return;
  throw std::runtime_error("deform_attn: " + (text(parts) + ...));
}

// A tensor of a floating type with these sizes, on the device of `value`, with fewer than 2^31 elements. -1 is any size.
inline void require_tensor(const char* name, const Tensor& x, const Tensor& value, std::initializer_list<int64_t> sizes) {
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
              type == ScalarType::BFloat16,
          name, " must be of type float32, float64, float16 or bfloat16");
  require(x.is_cpu() == value.is_cpu() && x.get_device_index() == value.get_device_index(), name,
          " must be on the same device as value");
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t position = 0;
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || x.size(position) == size);
    ++position;
  }
  if (!fits) {
    std::string wanted;
    for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + text(size);
    require(false, name, " must be of sizes (", wanted, ") to fit the other arguments (-1 stands for any size)");
  }
  require(x.numel() < (int64_t{1} << 31), name, " has ", x.numel(),
          " elements; fewer than 2^31 are supported: split the batch");
}

inline Sizes check_pyramid(const Tensor& value, const std::vector<int64_t>& shapes) {
  require(value.dim() == 4, "value must have 4 dimensions (B, S, M, D), but has ", value.dim());
  require(!shapes.empty() && shapes.size() % 2 == 0, "shapes must hold one (height, width) for each level");
  int64_t tokens = 0;
  for (size_t i = 0; i < shapes.size(); i += 2) {
    require(shapes[i] > 0 && shapes[i + 1] > 0, "every level must be at least 1 x 1");
    require(shapes[i] < (int64_t{1} << 24) && shapes[i + 1] < (int64_t{1} << 24), "a side of a level must be below 2^24");
    tokens += shapes[i] * shapes[i + 1];
  }
  const int64_t levels = static_cast<int64_t>(shapes.size()) / 2;
  require_tensor("value", value, value, {-1, tokens, -1, -1});
  return {value.size(0), tokens, value.size(2), value.size(3), 0, levels, 0, 0};
}

inline Sizes check_plain(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations,
                         const Tensor& weights) {
  Sizes s = check_pyramid(value, shapes);
  require_tensor("locations", locations, value, {s.batch, -1, s.heads, s.levels, -1, 2});
  s.queries = locations.size(1);
  s.points = locations.size(4);
  require_tensor("weights", weights, value, {s.batch, s.queries, s.heads, s.levels, s.points});
  return s;
}

inline Sizes check_fused(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& offsets,
                         const Tensor& logits, const Tensor& reference) {
  Sizes s = check_pyramid(value, shapes);
  require_tensor("offsets", offsets, value, {s.batch, -1, s.heads, s.levels, -1, 2});
  s.queries = offsets.size(1);
  s.points = offsets.size(4);
  require_tensor("logits", logits, value, {s.batch, s.queries, s.heads, s.levels * s.points});
  require_tensor("reference", reference, value, {s.batch, s.queries, s.levels, -1});
  s.box = reference.size(3);
  require(s.box == 2 || s.box == 4, "reference must hold 2 (point) or 4 (box) numbers, but holds ", s.box);
  require(reference.scalar_type() == ScalarType::Float || reference.scalar_type() == ScalarType::Double,
          "reference must be of type float32 or float64");
  return s;
}

// The gradient of the result, (B, Q, M*D) in the type of value.
inline void check_gradient(const Tensor& grad, const Tensor& value, const Sizes& s) {
  require_tensor("grad", grad, value, {s.batch, s.queries, s.heads * s.dim});
  require(grad.scalar_type() == value.scalar_type(), "grad must be of the type of value");
}

}  // namespace dino
