// The CPU kernels for x86 processors with AVX-512 (F, BW, DQ, VL); dino/layers/ops/build.py gives the options.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define DINO_KERNELS kernels_avx512
#define DINO_KERNELS_NAME "avx512"
#define DINO_VECTOR_BYTES 64
#include "deform_attn_kernels.h"
#else
#include "deform_attn_cpu.h"
const dino::Kernels* dino::kernels_avx512() { return nullptr; }
#endif
