// The operators of the library `dino`: names, arguments and results. A shared object of its own, loaded before those with
// kernels, for any C++17 compiler can make it: what can't compile the CPU kernels still serves CUDA.

#include <torch/csrc/stable/library.h>

// Without `by_reference`, the last gradient is an empty tensor: in DINO, nobody needs it.
STABLE_TORCH_LIBRARY(dino, m) {
  m.def("deform_attn_forward(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "deform_attn_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "deform_attn_backward_deterministic(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "deform_attn_fused_forward(Tensor value, SymInt[] shapes, Tensor offsets, Tensor logits, Tensor reference)"
      " -> Tensor");
  m.def(
      "deform_attn_fused_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor offsets, Tensor logits,"
      " Tensor reference, bool by_reference=True) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "deform_attn_fused_backward_deterministic(Tensor grad, Tensor value, SymInt[] shapes, Tensor offsets,"
      " Tensor logits, Tensor reference, bool by_reference=True) -> (Tensor, Tensor, Tensor, Tensor)");
}
