// Stands in for CUDA's header of this name, so that a C++ compiler can build the CUDA kernels and a CPU can run them, one
// block after the other in random order. It proves the arithmetic, the indices, that lanes meet where they must, and
// that no two threads touch the same memory without a barrier between them; it proves nothing about speed or alignment
// in shared memory.
//
// Each thread is a fiber (runtime.cpp). It runs until it waits for others of its warp or block; who runs next is drawn
// at random. A warp function that lanes reach in different places, or after one of them has left, ends the program with
// a message.
//
// The kernels are compiled with -fsanitize=thread, whose calls runtime.cpp answers: each load and store is checked
// against those of other threads since the last barrier.

#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr int kSyncWarp = 2;  // the meeting that orders memory; shuffles and votes don't

struct Position {
  unsigned x, y, z;
};

extern Position thread_index, block_index, block_size;
extern float4* const dynamic_shared;
extern int planted;      // number of the fault that is switched on, 0: none (mutants.py)
extern int most_shared;  // bytes of shared memory that a block can ask for

[[noreturn]] void fail(const char* reason);

// All lanes of a warp bring a number and get the numbers of all. `meeting` tells one warp function from another.
const uint64_t* meet(int meeting, uint64_t number);

void sync_block();

// To be called before `bytes` at `address` are changed in one step.
void note_atomic(const void* address, int bytes);

void run(int64_t blocks, int threads, size_t shared, const std::function<void()>& kernel);

template <typename T>
uint64_t bits_of(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size

template <typename T>
T __shfl_xor_sync(unsigned, T x, int bit) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return cuda_on_cpu::from_bits<T>(cuda_on_cpu::meet(100 + bit, cuda_on_cpu::bits_of(x))[lane ^ bit]);
}

template <typename T>
T __shfl_up_sync(unsigned, T x, unsigned distance) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  const uint64_t* all = cuda_on_cpu::meet(200 + distance, cuda_on_cpu::bits_of(x));
  return lane < distance ? x : cuda_on_cpu::from_bits<T>(all[lane - distance]);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* all = cuda_on_cpu::meet(1, vote);
  unsigned votes = 0;
  for (int i = 0; i < cuda_on_cpu::kWarp; ++i) votes |= static_cast<unsigned>(all[i] != 0) << i;
  return votes;
}

inline void __syncwarp() { cuda_on_cpu::meet(cuda_on_cpu::kSyncWarp, 0); }

inline void __syncthreads() { cuda_on_cpu::sync_block(); }

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) cuda_on_cpu::fail("a load is not aligned");
  return *from;
}

template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* to, T x) {
  cuda_on_cpu::note_atomic(to, sizeof(T));
  const T before = *to;
  *to = before + x;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<uint64_t>(x) * y >> 32; }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::from_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::from_bits<float>(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return static_cast<int>(cuda_on_cpu::bits_of(x)); }
inline long long __double_as_longlong(double x) { return static_cast<long long>(cuda_on_cpu::bits_of(x)); }
