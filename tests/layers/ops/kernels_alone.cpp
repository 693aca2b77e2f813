// The CPU kernels without PyTorch, so that they can run where there is none: under an emulator of another processor.
// Reads problems from standard input until it ends, as test_kernels_alone.py writes them, and writes what the operator
// would return: output, gradients of value, places, weights and, in the fused form, of reference in the working type.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "deform_attn_cpu.h"

using namespace dino;

namespace {

void require(bool holds) {
  if (!holds) exit(2);
}

int64_t bytes_of(Kind kind) { return kind == Kind::kDouble ? 8 : kind == Kind::kFloat ? 4 : 2; }

// Aligned memory, filled with a pattern that is no number in any of the types.
struct Block {
  int64_t size;
  char* data;

  explicit Block(int64_t bytes) : size(bytes), data(static_cast<char*>(aligned_alloc(64, bytes / 64 * 64 + 128))) {
    for (int64_t i = 0; i < bytes / 64 * 64 + 128; ++i) data[i] = static_cast<char>(0xff);
  }
  ~Block() { free(data); }
  Block(const Block&) = delete;
};

struct Elements : Block {
  Array array;

  Elements(int64_t count, Kind kind) : Block(count * bytes_of(kind)), array{data, kind} {}
  void read() { require(fread(data, 1, size, stdin) == static_cast<size_t>(size)); }
  void write() const { require(fwrite(data, 1, size, stdout) == static_cast<size_t>(size)); }
};

template <class A>
void sum_heads(const void* parts, const Problem& p, void* sums) {
  const int64_t row = p.queries * p.levels * p.box;
  for (int64_t i = 0; i < p.batch * row; ++i) {
    A sum = 0;
    for (int64_t head = 0; head < p.heads; ++head)
      sum += static_cast<const A*>(parts)[(i / row * p.heads + head) * row + i % row];
    static_cast<A*>(sums)[i] = sum;
  }
}

void solve(Problem& p, const Kernels& kernels, Kind working, const Array& grad) {
  const int64_t width = kernels.bytes / bytes_of(working), samples = p.levels * p.points;
  const auto padded = [&](int64_t count) { return (count + width - 1) / width * width; };
  const Elements anchors(p.batch * p.queries * p.box * padded(samples), working);
  const Elements packed(p.heads * p.tokens * padded(p.dim), working);
  p.anchors = anchors.data;
  p.packed = packed.data;
  if (p.box) kernels.expand(p, 0, p.batch * p.queries);

  const Elements output(p.batch * p.queries * p.heads * p.dim, p.value.kind);
  const Block forward_scratch(kernels.scratch_bytes(p, false));
  const int64_t blocks = block_heads(p) * query_blocks(p);
  for (int64_t image = 0; image < p.batch; ++image) {
    if (p.pack) kernels.pack(p, image, 0, p.tokens);
    kernels.forward(p, output.array, forward_scratch.data, image * blocks, (image + 1) * blocks);
  }

  const int64_t slots = p.batch * p.queries * p.heads;
  const Elements value(p.batch * p.tokens * p.heads * p.dim, p.value.kind), places(slots * samples * 2, p.places.kind);
  const Elements weights(slots * samples, p.weights.kind), references(slots * p.levels * p.box, working);
  const Block scratch(kernels.scratch_bytes(p, true));
  const Gradients gradients = {grad, value.array, places.array, weights.array, references.data};
  kernels.backward(p, gradients, scratch.data, 0, p.batch * p.heads);
  const Elements reference(p.batch * p.queries * p.levels * p.box, working);
  (working == Kind::kDouble ? sum_heads<double> : sum_heads<float>)(references.data, p, reference.data);
  for (const Elements* result : {&output, &value, &places, &weights, &reference}) result->write();
}

}  // namespace

int main() {
  int64_t head[13];
  while (fread(head, sizeof head, 1, stdin) == 1) {
    Problem p{};
    p.batch = head[0], p.tokens = head[1], p.heads = head[2], p.dim = head[3];
    p.queries = head[4], p.levels = head[5], p.points = head[6], p.box = head[7], p.pack = head[8];
    const auto kind = [&](int i) { return static_cast<Kind>(head[9 + i]); };
    std::vector<int64_t> shapes(2 * p.levels);
    require(fread(shapes.data(), sizeof(int64_t), shapes.size(), stdin) == shapes.size());
    p.shapes = shapes.data();
    const int64_t slots = p.batch * p.queries * p.heads, samples = p.levels * p.points;
    Elements value(p.batch * p.tokens * p.heads * p.dim, kind(0)), places(slots * samples * 2, kind(1));
    Elements weights(slots * samples, kind(2)), reference(p.batch * p.queries * p.levels * p.box, kind(3));
    Elements grad(slots * p.dim, kind(0));
    for (Elements* input : {&value, &places, &weights, &reference, &grad}) input->read();
    p.value = value.array, p.places = places.array, p.weights = weights.array, p.reference = reference.array;
    solve(p, *kernels_generic(), kind(0) == Kind::kDouble ? Kind::kDouble : Kind::kFloat, grad.array);
  }
  return 0;
}
