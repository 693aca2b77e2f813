// The CPU kernels for x86 processors with AVX2, FMA and F16C; dino/layers/ops/build.py gives the options.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DINO_KERNELS kernels_avx2
#define DINO_KERNELS_NAME "avx2"
#define DINO_VECTOR_BYTES 32
#include "deform_attn_kernels.h"
#else
#include "deform_attn_cpu.h"
const dino::Kernels* dino::kernels_avx2() { return nullptr; }
#endif
