// What deform_attn.cpp asks of the CPU kernels. The same code, deform_attn_kernels.h, is compiled several times, for
// different vector units, and one of the tables is chosen when the program runs. The kernels may not include a header
// with inline functions from PyTorch or the C++ library: the linker keeps one copy of such a function, which could then
// be made of instructions that this processor does not have.

#pragma once

#include <stdint.h>

namespace dino {

enum class Kind { kFloat, kDouble, kHalf, kBFloat16 };

// The contiguous elements of a tensor.
struct Array {
  void* data;
  Kind kind;
};

// "Working type" is double where the value is of type double, else float: all sums are made in it.
struct Problem {
  int64_t batch, tokens, heads, dim, queries, levels, points, box;
  const int64_t* shapes;  // (L, 2), height and width
  Array value;            // (B, S, M, D)
  Array places;           // (B, Q, M, L, P, 2): locations; offsets in the fused form
  Array weights;          // (B, Q, M, L, P); logits in the fused form
  Array reference;        // (B, Q, L, box); fused form only, where box is not 0
  void* anchors;          // (B, Q, 2 or 4, L*P) in the working type, made by `expand`; fused form only
  bool pack;              // `forward` gathers from a copy of the value in which the rows of a head lie together
  void* packed;           // (M, S, padded D) in the working type: that copy, of one image
};

struct Gradients {
  Array grad;       // (B, Q, M, D), in the type of value
  Array value;      // (B, S, M, D)
  Array places;     // (B, Q, M, L, P, 2)
  Array weights;    // (B, Q, M, L, P)
  void* reference;  // (B, M, Q, L, box) in the working type, not yet summed over heads; fused form only
};

// `begin` and `end` delimit the part of the work that a call does; parts may run at the same time.
struct Kernels {
  const char* name;
  int64_t bytes;  // of a vector; rows of a packed value are padded to whole ones
  int64_t (*scratch_bytes)(const Problem&, bool backward);  // what a call of forward or backward needs, aligned to 64
  void (*expand)(const Problem&, int64_t begin, int64_t end);                              // of B*Q queries
  void (*pack)(const Problem&, int64_t image, int64_t begin, int64_t end);                 // of S tokens
  void (*forward)(const Problem&, const Array& out, void*, int64_t begin, int64_t end);    // of blocks
  void (*backward)(const Problem&, const Gradients&, void*, int64_t begin, int64_t end);   // of B*M heads
};

// The forward pass goes block by block; blocks of a head follow each other, then come heads, then images. Static, so that
// each file keeps its own copy of these functions.
static inline int64_t block_queries(const Problem& p) { return p.pack ? 64 : 8; }
static inline int64_t block_heads(const Problem& p) { return p.pack ? p.heads : 1; }
static inline int64_t query_blocks(const Problem& p) { return (p.queries + block_queries(p) - 1) / block_queries(p); }

const Kernels* kernels_generic();
const Kernels* kernels_avx2();    // null where the compiler was not asked for these instructions
const Kernels* kernels_avx512();

}  // namespace dino
