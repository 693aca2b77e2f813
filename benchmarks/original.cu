// Calls the original kernels of Deformable DETR with plain pointers; original.py names the file that holds them.

#include <cuda_runtime.h>

#include ORIGINAL_KERNELS

struct Sizes {  // of one call; as in original.py
  int batch, tokens, heads, channels, levels, queries, points;
};

extern "C" int original_forward(cudaStream_t stream, const Sizes* n, const float* value, const int64_t* shapes,
                                const int64_t* starts, const float* locations, const float* weights, float* output) {
  ms_deformable_im2col_cuda<float>(stream, value, shapes, starts, locations, weights, n->batch, n->tokens, n->heads,
                                   n->channels, n->levels, n->queries, n->points, output);
  return cudaPeekAtLastError();
}

extern "C" int original_backward(cudaStream_t stream, const Sizes* n, const float* grad, const float* value,
                                 const int64_t* shapes, const int64_t* starts, const float* locations,
                                 const float* weights, float* by_value, float* by_locations, float* by_weights) {
  ms_deformable_col2im_cuda<float>(stream, grad, value, shapes, starts, locations, weights, n->batch, n->tokens,
                                   n->heads, n->channels, n->levels, n->queries, n->points, by_value, by_locations,
                                   by_weights);
  return cudaPeekAtLastError();
}
