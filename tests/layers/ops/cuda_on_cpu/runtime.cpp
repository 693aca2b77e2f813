// Runs kernels as fibers, and watches their memory. Compiled without -fsanitize=thread: nothing here is watched.

#include "cuda_runtime.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <link.h>
#include <numeric>
#include <random>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace cuda_on_cpu {

Position thread_index, block_index, block_size;
int planted, most_shared = 227 << 10;  // as compute capability 9.0

namespace {

constexpr size_t kStack = 64 << 10, kDynamicBytes = 256 << 10;
constexpr int kMostThreads = 1024;

alignas(16) char dynamic_bytes[kDynamicBytes];
size_t dynamic_size;  // that the launch asked for

// ---- Fibers

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started, done;
};

struct Warp {
  uint64_t given[kWarp], taken[2][kWarp];  // two: a fast lane may already wait at the next meeting
  int meeting, arrived, number, alive;
  unsigned epoch;  // changes with each barrier that lanes of this warp have passed
};

Fiber fibers[kMostThreads];
std::vector<char> stacks(kMostThreads* kStack);
std::vector<Warp> warps;
jmp_buf scheduler;
const std::function<void()>* kernel;
int arrived, barriers;
long long steps;  // arrivals and ends: where a round brings none, threads wait for ever
unsigned epoch;  // the newest; every barrier, block and launch makes a new one
unsigned block_epoch, launch_epoch;
bool running;  // a kernel, not the host

void pause() {
  const Position mine = thread_index;
  if (!_setjmp(fibers[mine.x].place)) _longjmp(scheduler, 1);
  thread_index = mine;
}

void start() {
  (*kernel)();
  fibers[thread_index.x].done = true;
  --warps[thread_index.x / kWarp].alive;
  ++steps;
  _longjmp(scheduler, 1);
}

void resume(int i) {
  thread_index = {static_cast<unsigned>(i), 0, 0};
  Fiber& fiber = fibers[i];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void run_block(int threads, std::mt19937& random) {
  std::vector<int> order;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    order.push_back(i);
  }
  while (!order.empty()) {
    const long long before = steps;
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) resume(i);
    order.erase(std::remove_if(order.begin(), order.end(), [](int i) { return fibers[i].done; }), order.end());
    if (steps == before) fail("threads wait for ever");
  }
}

// ---- Races. Two threads race for memory if one of them changes it, not both do so in one step, and no barrier of
// their warp or block lies between. Shared memory is what lies among the variables of this library.

struct Access {
  int thread = -1;  // of the launch
  unsigned warp_epoch = 0, block_epoch = 0;
};

struct Cell {  // two bytes, the smallest number there is
  Access write, atomic, read, other_read;  // the newest; other_read is by another thread than read
};

constexpr uintptr_t kPage = 4096;
std::unordered_map<uintptr_t, std::vector<Cell>> pages;
uintptr_t variables_begin, variables_end;
std::vector<uint16_t*> shared_numbers;  // all that any block has written

std::vector<Cell>& page_of(uintptr_t number) {
  static std::vector<Cell>* known[256];
  static uintptr_t numbers[256];
  const unsigned slot = number % 256;
  if (!known[slot] || numbers[slot] != number) {
    std::vector<Cell>& page = pages[number];
    if (page.empty()) page.resize(kPage / 2);
    known[slot] = &page, numbers[slot] = number;
  }
  return *known[slot];
}

bool is_shared(uintptr_t address) { return address >= variables_begin && address < variables_end; }

bool race(const Access& before, const Access& now, bool shared) {
  if (before.thread < 0 || before.thread == now.thread || before.block_epoch < launch_epoch) return false;
  if (before.thread / kMostThreads != now.thread / kMostThreads) return !shared;  // each block has its own
  if (before.thread / kWarp != now.thread / kWarp) return before.block_epoch == now.block_epoch;
  return before.warp_epoch == now.warp_epoch;
}

enum class Kind { kRead, kWrite, kAtomic };

void check(Cell& cell, Kind kind, const Access& now, bool shared) {
  const bool raced = race(cell.write, now, shared) || (kind != Kind::kAtomic && race(cell.atomic, now, shared)) ||
                     (kind != Kind::kRead && (race(cell.read, now, shared) || race(cell.other_read, now, shared)));
  if (raced) fail(shared ? "a race for shared memory" : "a race for global memory");
  if (kind == Kind::kWrite) cell.write = now;
  if (kind == Kind::kAtomic) cell.atomic = now;
  if (kind == Kind::kRead) {
    if (cell.read.thread != now.thread) cell.other_read = cell.read;
    cell.read = now;
  }
}

void note(const void* pointer, uintptr_t bytes, Kind kind) {
  if (!running) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), stack = reinterpret_cast<uintptr_t>(stacks.data());
  if (address - stack < stacks.size()) return;  // a thread's own
  const uintptr_t dynamic = address - reinterpret_cast<uintptr_t>(dynamic_bytes);
  if (dynamic < kDynamicBytes && dynamic + bytes > dynamic_size) fail("more shared memory than the launch asked for");
  const Access now{static_cast<int>(block_index.x * kMostThreads + thread_index.x), warps[thread_index.x / kWarp].epoch,
                   block_epoch};
  const bool shared = is_shared(address);
  Cell* page = nullptr;
  for (uintptr_t at = address / 2; at <= (address + bytes - 1) / 2; ++at) {
    if (!page || at % (kPage / 2) == 0) page = page_of(at * 2 / kPage).data();
    Cell& cell = page[at % (kPage / 2)];
    if (shared && kind == Kind::kWrite && cell.write.thread < 0) {
      shared_numbers.push_back(reinterpret_cast<uint16_t*>(at * 2));
    }
    check(cell, kind, now, shared);
  }
}

// Where the variables of this library lie.
int find_variables(dl_phdr_info* library, size_t, void*) {
  const uintptr_t mine = reinterpret_cast<uintptr_t>(dynamic_bytes);
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& part = library->dlpi_phdr[i];
    const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
    if (part.p_type != PT_LOAD || mine < begin || mine >= begin + part.p_memsz) continue;
    variables_begin = begin, variables_end = begin + part.p_memsz;
    return 1;
  }
  return 0;
}

}  // namespace

float4* const dynamic_shared = reinterpret_cast<float4*>(dynamic_bytes);

void fail(const char* reason) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", block_index.x, thread_index.x, reason);
  std::abort();
}

const uint64_t* meet(int meeting, uint64_t number) {
  Warp& warp = warps[thread_index.x / kWarp];
  const int round = warp.number;
  if (warp.arrived == 0) warp.meeting = meeting;
  if (warp.meeting != meeting) fail("lanes of a warp wait for different things");
  warp.given[thread_index.x % kWarp] = number;
  ++steps;
  if (++warp.arrived == kWarp) {
    std::memcpy(warp.taken[round % 2], warp.given, sizeof warp.given);
    warp.arrived = 0;
    ++warp.number;
    if (meeting == kSyncWarp) warp.epoch = ++epoch;
  }
  while (warp.number == round) {
    if (warp.alive < kWarp) fail("a lane has left that others wait for");
    pause();
  }
  return warp.taken[round % 2];
}

void sync_block() {
  const int round = barriers;
  ++steps;
  if (++arrived == static_cast<int>(block_size.x)) {
    arrived = 0;
    ++barriers;
    block_epoch = ++epoch;
    for (Warp& warp : warps) warp.epoch = epoch;
  }
  while (barriers == round) pause();
}

void note_atomic(const void* address, int bytes) { note(address, bytes, Kind::kAtomic); }

void run(int64_t blocks, int threads, size_t shared, const std::function<void()>& function) {
  static std::mt19937 random(0);
  if (shared > kDynamicBytes || threads % kWarp || threads > kMostThreads || blocks >= INT32_MAX / kMostThreads) {
    std::abort();
  }
  if (!variables_begin) dl_iterate_phdr(find_variables, nullptr);
  kernel = &function;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  dynamic_size = shared;
  launch_epoch = ++epoch;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t block : order) {
    block_index = {static_cast<unsigned>(block), 0, 0};
    arrived = barriers = 0;
    block_epoch = ++epoch;
    warps.assign(threads / kWarp, Warp{});
    for (Warp& warp : warps) warp.alive = kWarp, warp.epoch = epoch;
    for (uint16_t* number : shared_numbers) *number = 0xffff;  // not a number
    std::memset(dynamic_bytes, 0xff, shared);
    running = true;
    run_block(threads, random);
    running = false;
  }
}

}  // namespace cuda_on_cpu

extern "C" {

__attribute__((visibility("default"))) void plant(int number) { cuda_on_cpu::planted = number; }
__attribute__((visibility("default"))) void limit_shared(int bytes) { cuda_on_cpu::most_shared = bytes; }

// What -fsanitize=thread calls.
#define WATCH(SIZE)                                                                                            \
  void __tsan_read##SIZE(void* x) { cuda_on_cpu::note(x, SIZE, cuda_on_cpu::Kind::kRead); }                    \
  void __tsan_write##SIZE(void* x) { cuda_on_cpu::note(x, SIZE, cuda_on_cpu::Kind::kWrite); }                  \
  void __tsan_unaligned_read##SIZE(void* x) { cuda_on_cpu::note(x, SIZE, cuda_on_cpu::Kind::kRead); }          \
  void __tsan_unaligned_write##SIZE(void* x) { cuda_on_cpu::note(x, SIZE, cuda_on_cpu::Kind::kWrite); }
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
void __tsan_read_range(void* x, unsigned long size) { cuda_on_cpu::note(x, size, cuda_on_cpu::Kind::kRead); }
void __tsan_write_range(void* x, unsigned long size) { cuda_on_cpu::note(x, size, cuda_on_cpu::Kind::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
int __tsan_atomic32_fetch_add(volatile int* x, int y, int) { return __atomic_fetch_add(x, y, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* x, int) { return __atomic_load_n(x, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* x, int) { return __atomic_load_n(x, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const volatile long* x, int) { return __atomic_load_n(x, __ATOMIC_SEQ_CST); }
}
