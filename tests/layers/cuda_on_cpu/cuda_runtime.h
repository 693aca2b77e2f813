// Stands in for CUDA's header of this name, so that a C++ compiler can build the CUDA kernels and a CPU can run them,
// one block after the other. It proves the arithmetic, the indices and that lanes meet where they must; it proves
// nothing about speed, memory order or atomicity.
//
// Each thread is a fiber. It runs until it waits for others of its warp or block; who runs next is drawn at random. A
// warp function that lanes reach in different places, or after one of them has left, ends the program with a message.

#pragma once

#include <driver_types.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

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
constexpr size_t kStack = 64 << 10;

struct Position {
  unsigned x, y, z;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

struct Warp {
  uint64_t given[kWarp], taken[2][kWarp];  // two: a fast lane may already wait at the next meeting
  int meeting, arrived, number, alive;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline int current, arrived, barriers;
inline Position thread_index, block_index, block_size;
inline float4 dynamic_shared[1 << 14];

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", block_index.x, thread_index.x, reason);
  std::abort();
}

inline void pause() {
  const Position mine = thread_index;
  swapcontext(&fibers[mine.x].context, &scheduler);
  thread_index = mine;
}

inline void start() {
  kernel();
  fibers[current].done = true;
  --warps[current / kWarp].alive;
  swapcontext(&fibers[current].context, &scheduler);
}

// All lanes of a warp bring a number and get the numbers of all. `meeting` tells one warp function from another.
inline const uint64_t* meet(int meeting, uint64_t number) {
  Warp& warp = warps[thread_index.x / kWarp];
  const int round = warp.number;
  if (warp.arrived == 0) warp.meeting = meeting;
  if (warp.meeting != meeting) fail("lanes of a warp wait for different things");
  warp.given[thread_index.x % kWarp] = number;
  if (++warp.arrived == kWarp) {
    std::memcpy(warp.taken[round % 2], warp.given, sizeof warp.given);
    warp.arrived = 0;
    ++warp.number;
  }
  while (warp.number == round) {
    if (warp.alive < kWarp) fail("a lane has left that others wait for");
    pause();
  }
  return warp.taken[round % 2];
}

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

inline void run_block(int threads, std::mt19937& random) {
  std::vector<int> order;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(kStack);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    order.push_back(i);
  }
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      current = i;
      thread_index = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](int i) { return fibers[i].done; }), order.end());
  }
}

inline void run(unsigned blocks, int threads, size_t shared, std::function<void()> function) {
  static std::mt19937 random(0);
  if (shared > sizeof dynamic_shared || threads % kWarp) std::abort();
  kernel = std::move(function);
  block_size = {static_cast<unsigned>(threads), 1, 1};
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  for (unsigned block = 0; block < blocks; ++block) {
    block_index = {block, 0, 0};
    arrived = barriers = 0;
    warps.assign(threads / kWarp, Warp{});
    for (Warp& warp : warps) warp.alive = kWarp;
    std::memset(dynamic_shared, 0xff, shared);  // not a number
    run_block(threads, random);
  }
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

inline bool __any_sync(unsigned, bool vote) {
  const uint64_t* all = cuda_on_cpu::meet(3, vote);
  return std::any_of(all, all + cuda_on_cpu::kWarp, [](uint64_t x) { return x != 0; });
}

inline void __syncwarp() { cuda_on_cpu::meet(2, 0); }

inline void __syncthreads() {
  const int round = cuda_on_cpu::barriers;
  if (++cuda_on_cpu::arrived == static_cast<int>(blockDim.x)) {
    cuda_on_cpu::arrived = 0;
    ++cuda_on_cpu::barriers;
  }
  while (cuda_on_cpu::barriers == round) cuda_on_cpu::pause();
}

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) cuda_on_cpu::fail("a load is not aligned");
  return *from;
}

template <typename T>
T atomicAdd(T* to, T x) {
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
