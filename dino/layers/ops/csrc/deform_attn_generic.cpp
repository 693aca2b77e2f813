// The CPU kernels for any processor: vectors of 16 bytes, which every 64-bit one has, or the compiler splits.
#define DINO_KERNELS kernels_generic
#define DINO_KERNELS_NAME "generic"
#define DINO_VECTOR_BYTES 16
#include "deform_attn_kernels.h"
