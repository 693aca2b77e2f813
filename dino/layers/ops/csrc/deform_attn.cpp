// The CPU part of the operators: checks, scratch memory, and cutting the work over PyTorch's threads.
// Built against LibTorch's stable ABI: one binary serves every Python and every torch from 2.10 on.

#include "deform_attn.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <new>
#include <tuple>

#include "deform_attn_cpu.h"

namespace dino {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

#if defined(__x86_64__)
// GCC 10 and Clang 14 can't ask for this feature by name. Whether the system keeps the registers, AVX2 tells.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels& kernels() {
  static const Kernels* const best = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && kernels_avx512()) return kernels_avx512();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && kernels_avx2()) return kernels_avx2();
#endif
    return kernels_generic();
  }();
  return *best;
}

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(bytes + 64, std::align_val_t(64))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

Array array_of(const Tensor& x) {
  Kind kind = Kind::kFloat;
  if (x.scalar_type() == ScalarType::Double) kind = Kind::kDouble;
  if (x.scalar_type() == ScalarType::Half) kind = Kind::kHalf;
  if (x.scalar_type() == ScalarType::BFloat16) kind = Kind::kBFloat16;
  return {x.data_ptr(), kind};
}

int64_t working_bytes(const Problem& p) { return p.value.kind == Kind::kDouble ? 8 : 4; }

int64_t padded(int64_t count, const Problem& p) {
  const int64_t lanes = kernels().bytes / working_bytes(p);
  return (count + lanes - 1) / lanes * lanes;
}

// The arguments as the kernels take them, made contiguous and kept alive. How the work is done depends on sizes alone.
struct Call {
  std::vector<int64_t> shapes;
  std::vector<Tensor> held;
  Problem problem;

  Call(const Sizes& s, const std::vector<int64_t>& levels, const Tensor& value, const Tensor& places,
       const Tensor& weights, const Tensor* reference)
      : shapes(levels), held{contiguous(value), contiguous(places), contiguous(weights)} {
    if (reference) held.push_back(contiguous(*reference));
    problem = {s.batch,           s.tokens,          s.heads,           s.dim,
               s.queries,         s.levels,          s.points,          s.box,
               shapes.data(),     array_of(held[0]), array_of(held[1]), array_of(held[2]),
               array_of(held.back()), nullptr,       false,             nullptr};
    // A copy pays where its rows are read often, and makes whole vectors of any number of channels.
    const int64_t corners = 4 * s.queries * s.levels * s.points;
    problem.pack = corners >= 8 * s.tokens || s.dim != padded(s.dim, problem);
    require(s.tokens * padded(s.dim, problem) < (int64_t{1} << 31),
            "one head of one image has more than 2^31 numbers with its padding: fewer are supported");
  }

  int64_t anchor_bytes() const {
    const Problem& p = problem;
    return p.batch * p.queries * p.box * padded(p.levels * p.points, p) * working_bytes(p);
  }

  void expand(const Scratch& anchors) {
    problem.anchors = anchors.data();
    if (!problem.box) return;
    parallel_for(0, problem.batch * problem.queries, 256,
                 [&](int64_t begin, int64_t end) { kernels().expand(problem, begin, end); });
  }
};

Tensor forward(const Sizes& s, const std::vector<int64_t>& shapes, const Tensor& value, const Tensor& places,
               const Tensor& weights, const Tensor* reference) {
  const std::vector<int64_t> sizes{s.batch, s.queries, s.heads * s.dim};
  if (s.levels * s.points == 0) return new_zeros(value, sizes);
  Tensor out = new_empty(value, sizes);
  require(out.numel() < (int64_t{1} << 31), "the result would have more than 2^31 elements: split the batch");
  if (out.numel() == 0) return out;
  Call call(s, shapes, value, places, weights, reference);
  Problem& p = call.problem;
  const Scratch anchors(call.anchor_bytes());
  call.expand(anchors);
  const auto blocks = [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels().scratch_bytes(p, false));
    kernels().forward(p, array_of(out), scratch.data(), begin, end);
  };
  const int64_t blocks_of_image = block_heads(p) * query_blocks(p);
  if (!p.pack) {
    parallel_for(0, p.batch * blocks_of_image, 1, blocks);
    return out;
  }
  const Scratch packed(p.heads * p.tokens * padded(p.dim, p) * working_bytes(p));
  p.packed = packed.data();
  for (int64_t image = 0; image < p.batch; ++image) {
    parallel_for(0, p.tokens, 64, [&](int64_t begin, int64_t end) { kernels().pack(p, image, begin, end); });
    parallel_for(image * blocks_of_image, (image + 1) * blocks_of_image, 1, blocks);
  }
  return out;
}

// Sums (B, M, Q, N) over M into (B, Q, N), in the order of the heads.
template <class A, class T>
void sum_heads(const A* parts, const Problem& p, T* sums) {
  const int64_t row = p.queries * p.levels * p.box;
  parallel_for(0, p.batch * row, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* part = parts + i / row * p.heads * row + i % row;
      A sum = 0;
      for (int64_t head = 0; head < p.heads; ++head) sum += part[head * row];
      sums[i] = static_cast<T>(sum);
    }
  });
}

void sum_heads_of(const void* parts, const Problem& p, Tensor& sums) {
  const bool wide = p.value.kind == Kind::kDouble, wide_sums = sums.scalar_type() == ScalarType::Double;
  if (wide && wide_sums) return sum_heads(static_cast<const double*>(parts), p, sums.mutable_data_ptr<double>());
  if (wide) return sum_heads(static_cast<const double*>(parts), p, sums.mutable_data_ptr<float>());
  if (wide_sums) return sum_heads(static_cast<const float*>(parts), p, sums.mutable_data_ptr<double>());
  sum_heads(static_cast<const float*>(parts), p, sums.mutable_data_ptr<float>());
}

using Sequence = std::vector<int64_t>;

Sequence sizes_of(const Tensor& x) {
  Sequence sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

// Gradients of value, places, weights and, if it is wanted, reference.
std::vector<Tensor> backward(const Sizes& s, const Tensor& grad, const std::vector<int64_t>& shapes, const Tensor& value,
                             const Tensor& places, const Tensor& weights, const Tensor* reference, bool by_reference) {
  std::vector<const Tensor*> inputs{&value, &places, &weights};
  if (by_reference) inputs.push_back(reference);
  std::vector<Tensor> results;
  if (grad.numel() == 0 || s.levels * s.points == 0) {
    for (const Tensor* x : inputs) results.push_back(new_zeros(*x, sizes_of(*x)));
    return results;
  }
  Call call(s, shapes, value, places, weights, reference);
  const Problem& p = call.problem;
  for (const Tensor* x : inputs) results.push_back(new_empty(*x, sizes_of(*x)));
  const Tensor contiguous_grad = contiguous(grad);
  const Scratch anchors(call.anchor_bytes());
  call.expand(anchors);
  const int64_t row = by_reference ? p.levels * p.box : 0;
  const Scratch references(p.batch * p.heads * p.queries * row * working_bytes(p));
  const Gradients gradients = {array_of(contiguous_grad), array_of(results[0]), array_of(results[1]),
                               array_of(results[2]), by_reference ? references.data() : nullptr};
  parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels().scratch_bytes(p, true));
    kernels().backward(p, gradients, scratch.data(), begin, end);
  });
  if (by_reference) sum_heads_of(references.data(), p, results[3]);
  return results;
}

Tensor plain_forward(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& locations,
                     const Tensor& weights) {
  return forward(check_plain(value, shapes, locations, weights), shapes, value, locations, weights, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad, const Tensor& value,
                                                  const std::vector<int64_t>& shapes, const Tensor& locations,
                                                  const Tensor& weights) {
  const Sizes s = check_plain(value, shapes, locations, weights);
  check_gradient(grad, value, s);
  const std::vector<Tensor> results = backward(s, grad, shapes, value, locations, weights, nullptr, false);
  return {results[0], results[1], results[2]};
}

Tensor fused_forward(const Tensor& value, const std::vector<int64_t>& shapes, const Tensor& offsets,
                     const Tensor& logits, const Tensor& reference) {
  return forward(check_fused(value, shapes, offsets, logits, reference), shapes, value, offsets, logits, &reference);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(const Tensor& grad, const Tensor& value,
                                                          const std::vector<int64_t>& shapes, const Tensor& offsets,
                                                          const Tensor& logits, const Tensor& reference,
                                                          bool by_reference) {
  const Sizes s = check_fused(value, shapes, offsets, logits, reference);
  check_gradient(grad, value, s);
  std::vector<Tensor> results = backward(s, grad, shapes, value, offsets, logits, &reference, by_reference);
  if (!by_reference) results.push_back(new_empty(reference, {0}));
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace
}  // namespace dino

// Which table of kernels runs on this processor; read by dino/layers/ops/operator.py.
extern "C" __attribute__((visibility("default"))) const char* dino_deform_attn_cpu() { return dino::kernels().name; }

STABLE_TORCH_LIBRARY_IMPL(dino, CPU, m) {
  m.impl("deform_attn_forward", TORCH_BOX(&dino::plain_forward));
  m.impl("deform_attn_backward", TORCH_BOX(&dino::plain_backward));
  m.impl("deform_attn_fused_forward", TORCH_BOX(&dino::fused_forward));
  m.impl("deform_attn_fused_backward", TORCH_BOX(&dino::fused_backward));
  // Always so on a CPU; CUDA has kernels of their own for these two.
  m.impl("deform_attn_backward_deterministic", TORCH_BOX(&dino::plain_backward));
  m.impl("deform_attn_fused_backward_deterministic", TORCH_BOX(&dino::fused_backward));
}
