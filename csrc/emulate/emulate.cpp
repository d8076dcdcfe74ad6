// Runs CUDA kernels on a CPU and checks every access they make. See README.md beside this file.
//
// A thread of a block is a fiber (ucontext), which runs until it waits for others. Blocks run one after another. The .cu
// sources are compiled with -fsanitize=thread, which makes g++ call __tsan_read4(p) before every load of 4 bytes, and so
// on; these functions are defined here, so each access passes through access().
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <torch/library.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <unordered_map>
#include <vector>

#include "cuda.h"

extern "C" char __ehdr_start, _end;  // of this module

dim3::dim3(int64_t x, int64_t y, int64_t z) : x(x), y(y), z(z) {
  const bool fits = 0 < x && x < (1LL << 31) && 0 < y && y < (1 << 16) && 0 < z && z < (1 << 16);
  TORCH_CHECK(fits, "emulate: a grid or block of ", x, " x ", y, " x ", z, " cannot be launched");
}

namespace emulate {
namespace {

constexpr int kWarp = 32, kStack = 64 << 10, kRedZone = 64;
constexpr size_t kPlain = 48 << 10, kMost = 227 << 10;  // bytes of shared memory, without and with the attribute

// ---- What is known about a word: who wrote it last, and who has read it since -----------------------------------------

constexpr int kNobody = -1, kSeveral = -2;

struct Who {
  int block = kNobody, thread = kNobody, epoch = 0;  // epoch: barriers that the block has passed
  bool before(const Who& other) const {  // whether the program orders this access before the other's
    return block == kNobody || (block == other.block && (thread == other.thread || epoch < other.epoch));
  }
};

struct Word {
  Who writer, reader;
  int since = 0;
  bool atomic = false, filled = false;  // the last write was atomic; something was written (shared memory)
};

struct Memory {
  const char* begin = nullptr;
  size_t size = 0;
  bool shared = false;
  size_t unit = 4;          // bytes of a word: the size of the smallest access so far
  std::vector<Word> words;  // allocated when a kernel first uses it
};

std::map<const char*, Memory> memories;  // of all tensors, by their first byte

// ---- A launch -----------------------------------------------------------------------------------------------------

enum class State { ready, barrier, collective, done };

struct Fiber {
  ucontext_t context;  // to begin with
  jmp_buf jump;        // to resume from; saves no signal mask, which would take a system call
  bool started = false;
  std::vector<char> stack = std::vector<char>(kStack);
  dim3 index;
  int number = 0, line = 0;
  State state = State::ready;
};

struct Warp {
  uint64_t values[kWarp], given[2][kWarp];  // given: of the last two collectives
  unsigned arrived = 0, mask = 0, round = 0;
  int line = 0;
};

struct Pending {  // a write where another thread has written: harmless if it writes the same
  const char* p = nullptr;
  size_t bytes = 0;
  char old[16];
  const void* site = nullptr;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<char> arena(kMost + 4096);  // shared memory of the running block
std::unordered_map<const void*, std::pair<size_t, size_t>> statics;  // key -> offset and size in the arena
Memory shared_memory{arena.data(), arena.size(), true};
std::unordered_map<const void*, size_t> allowed;  // dynamic shared memory by kernel
Config config;
dim3 block;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
const char* kernel_name = "";
const char* host_stack = nullptr;
std::string problem;
Pending pending;
const void* site = nullptr;  // of the access
size_t used = 0;  // bytes of the arena
Memory* last = nullptr;  // accessed in this launch, during which none is freed
int launches = 0, blocks_run = 0, block_number = 0, epoch = 0, running = 0;
unsigned order = 0;

std::string where() {
  std::ostringstream s;
  s << kernel_name << ", block " << block_number << ", thread " << (current ? current->number : 0);
  Dl_info module;
  if (site && dladdr(site, &module)) {  // the line of the .cu file
    s << " at ";
    const auto offset = static_cast<const char*>(site) - static_cast<const char*>(module.dli_fbase) - 1;
    char command[4096], line[4096] = "";
    std::snprintf(command, sizeof(command), "addr2line -e '%s' %#tx", module.dli_fname, offset);
    if (FILE* pipe = popen(command, "r")) {
      if (std::fgets(line, sizeof(line), pipe)) s << std::string(line, std::strcspn(line, " \n"));
      pclose(pipe);
    }
  }
  return s.str();
}

void leave() {
  if (!_setjmp(current->jump)) _longjmp(scheduler, 1);
}

// Ends the launch: nothing of a kernel needs to be destroyed, so its fibers are abandoned.
void fail(const std::string& what) {
  if (problem.empty()) problem = "emulate: " + what + " in " + where();
  if (current) leave();
}

void settle() {
  const bool same = !pending.p || !std::memcmp(pending.p, pending.old, pending.bytes);
  pending.p = nullptr;
  if (!same) site = pending.site, fail("a race (two threads write different values, with no barrier between)");
}

void wait(State state, int line) {
  settle();
  current->state = state, current->line = line;
  leave();
}

void record(Memory& m, const char* p, size_t bytes, Access kind) {
  if (m.words.empty() || bytes < m.unit) {
    const size_t unit = std::min(m.unit, bytes);
    std::vector<Word> words((m.size + unit - 1) / unit);
    for (size_t i = 0; !m.words.empty() && i < words.size(); ++i) words[i] = m.words[i * unit / m.unit];
    m.unit = unit, m.words.swap(words);
  }
  const Who who{block_number, current->number, epoch};
  const size_t first = (p - m.begin) / m.unit, count = bytes / m.unit;
  for (size_t i = first; i < first + count; ++i) {
    Word& word = m.words[i];
    const int since = m.shared ? blocks_run : launches;  // earlier launches are ordered, other blocks' shared memory unknown
    if (word.since != since) word = {}, word.since = since;
    if (m.shared && kind != Access::write && !word.filled) return fail("shared memory is read before it is written");
    const bool both_atomic = kind == Access::atomic && word.atomic;
    if (!word.writer.before(who) && !both_atomic) {
      if (kind != Access::write) return fail("a race (a read of what another thread has written, with no barrier between)");
      pending = {p, bytes, {}, site}, std::memcpy(pending.old, p, bytes);
    }
    if (kind != Access::read && !word.reader.before(who)) return fail("a race (a write where another thread has read, with no barrier between)");
    if (kind == Access::read) {
      const bool others = word.reader.block != kNobody && word.reader.epoch == epoch && word.reader.thread != who.thread;
      const bool blocks = word.reader.block != kNobody && word.reader.block != who.block;
      word.reader = {blocks ? kSeveral : who.block, others || blocks ? kSeveral : who.thread, epoch};
    } else {
      word.writer = who, word.reader = {}, word.atomic = kind == Access::atomic, word.filled = true;
    }
  }
}

Memory* memory_at(const char* p, size_t bytes) {
  if (last && p >= last->begin && p + bytes <= last->begin + last->size) return last;
  auto it = memories.upper_bound(p);
  if (it == memories.begin()) return nullptr;
  Memory& m = std::prev(it)->second;
  if (p + bytes > m.begin + m.size) return nullptr;
  return last = &m;
}

void enter() {
  for (;;) {  // block after block
    (*body)();
    settle();
    current->state = State::done;
    leave();
  }
}

// Starts or resumes `current`, until it leaves.
__attribute__((noinline)) void go_on() {
  if (_setjmp(scheduler)) return;
  if (current->started) _longjmp(current->jump, 1);
  current->started = true;
  getcontext(&current->context);
  current->context.uc_stack.ss_sp = current->stack.data(), current->context.uc_stack.ss_size = kStack;
  makecontext(&current->context, enter, 0);
  setcontext(&current->context);
}

std::vector<int> permutation(int n) {  // forward, backward, or shuffled
  std::vector<int> found(n);
  std::iota(found.begin(), found.end(), 0);
  if (order == 1) std::reverse(found.begin(), found.end());
  if (order > 1) std::shuffle(found.begin(), found.end(), std::mt19937(order + block_number));
  return found;
}

void run_block() {
  const int n = config.block.x * config.block.y * config.block.z;
  while (static_cast<int>(fibers.size()) < n) fibers.push_back(std::make_unique<Fiber>());
  warps.assign((n + kWarp - 1) / kWarp, {});
  std::fill(arena.begin(), arena.begin() + std::max(used, config.shared), static_cast<char>(0xff));
  statics.clear(), used = config.shared + kRedZone, epoch = 0, ++blocks_run;
  for (int i = 0; i < n; ++i) {
    Fiber& f = *fibers[i];
    f.index.x = i % config.block.x, f.index.y = i / config.block.x % config.block.y, f.index.z = i / config.block.x / config.block.y;
    f.number = i, f.state = State::ready;
  }
  const auto turns = permutation(n);
  for (int done = 0; done < n;) {
    bool moved = false;
    for (const int i : turns) {
      current = fibers[i].get();
      if (current->state != State::ready) continue;
      moved = true;
      go_on();
      done += current->state == State::done;
      if (!problem.empty()) return;
    }
    if (moved) continue;
    int line = 0, waiting = 0;
    for (int i = 0; i < n; ++i)
      if (fibers[i]->state == State::barrier) {
        current = fibers[i].get();
        if (line && line != current->line) return void(problem = "emulate: threads wait at different barriers in " + where());
        line = current->line, ++waiting;
      }
    if (done < n && waiting < n) return void(problem = "emulate: a barrier or collective that some threads never reach in " + where());
    for (int i = 0; i < n; ++i) fibers[i]->state = State::ready;
    ++epoch;
  }
}

// A collective of the lanes in `mask`: returns their values once all have come.
const uint64_t* meet(int line, unsigned mask, uint64_t value) {
  Warp& warp = warps[current->number / kWarp];
  const int lane = current->number % kWarp;
  if (!(mask >> lane & 1)) fail("a lane that is not in its own mask");
  if (warp.arrived && (warp.line != line || warp.mask != mask)) fail("lanes of a warp at different collectives");
  warp.line = line, warp.mask = mask, warp.values[lane] = value, warp.arrived |= 1u << lane;
  const unsigned round = warp.round;
  if (warp.arrived == mask) {
    std::copy(warp.values, warp.values + kWarp, warp.given[round % 2]);
    warp.arrived = 0, ++warp.round;
    const int first = current->number - lane, n = config.block.x * config.block.y * config.block.z;
    for (int i = first; i < std::min(first + kWarp, n); ++i)
      if (fibers[i]->state == State::collective && mask >> (i - first) & 1) fibers[i]->state = State::ready;
  } else {
    wait(State::collective, line);
  }
  return warp.given[round % 2];
}

}  // namespace

dim3 thread_index() { return current->index; }
dim3 block_index() { return block; }
dim3 block_size() { return config.block; }
dim3 grid_size() { return config.grid; }
void barrier(int line) { wait(State::barrier, line); }

unsigned ballot(int line, unsigned mask, bool value) {
  const uint64_t* values = meet(line, mask, value);
  unsigned found = 0;
  for (int i = 0; i < kWarp; ++i) found |= (mask >> i & 1) && values[i] ? 1u << i : 0;
  return found;
}

uint64_t exchange(int line, unsigned mask, uint64_t value, Lane kind, int by) {
  const uint64_t* values = meet(line, mask, value);
  const int lane = current->number % kWarp;
  const int from = kind == Lane::down ? lane + by : kind == Lane::up ? lane - by : kind == Lane::bfly ? lane ^ by : by % kWarp;
  if (from < 0 || from >= kWarp) return value;
  if (!(mask >> from & 1)) fail("a shuffle from a lane that takes no part");
  return values[from];
}

void* static_shared(const void* key, size_t bytes, size_t align) {
  auto [it, added] = statics.try_emplace(key, 0, bytes);
  if (added) {
    it->second.first = (used + align - 1) / align * align;
    used = it->second.first + bytes + kRedZone;
  }
  return arena.data() + it->second.first;
}

void* dynamic_shared() { return arena.data(); }
void allow_shared(const void* kernel, size_t bytes) { allowed[kernel] = bytes; }

void access(const void* address, size_t bytes, Access kind) {
  if (!running || !current) return;
  const char* p = static_cast<const char*>(address);
  if (p >= current->stack.data() && p < current->stack.data() + kStack) return;
  settle();
  if (reinterpret_cast<uintptr_t>(p) % bytes) return fail("an access that is not aligned");
  if (p >= arena.data() && p < arena.data() + arena.size()) {
    const size_t at = p - arena.data();
    bool inside = at + bytes <= config.shared;
    for (const auto& [key, place] : statics) inside |= at >= place.first && at + bytes <= place.first + place.second;
    return inside ? record(shared_memory, p, bytes, kind) : fail("an access outside shared memory");
  }
  if (Memory* m = memory_at(p, bytes)) return record(*m, p, bytes, kind);
  const bool parameters = p > host_stack - (1 << 20) && p < host_stack + (1 << 20), constant = p >= &__ehdr_start && p < &_end;
  if (kind == Access::read && (parameters || constant)) return;
  fail("an access outside all tensors");
}

void run(const Config& given, const char* name, const void* kernel, const std::function<void()>& kernel_body) {
  config = given, body = &kernel_body, kernel_name = name;
  const int64_t threads = int64_t{config.block.x} * config.block.y * config.block.z;
  TORCH_CHECK(threads <= 1024, "emulate: ", name, " has ", threads, " threads in a block: at most 1,024 can be launched");
  char here;
  host_stack = &here, problem.clear(), last = nullptr, ++launches, running = 1;
  const auto blocks = permutation(config.grid.x * config.grid.y * config.grid.z);
  for (const int b : blocks) {
    block.x = b % config.grid.x, block.y = b / config.grid.x % config.grid.y, block.z = b / config.grid.x / config.grid.y;
    block_number = b;
    run_block();
    size_t bytes = config.shared;
    for (const auto& [key, place] : statics) bytes += place.second;
    const size_t most = allowed.count(kernel) && allowed[kernel] >= config.shared ? kMost : kPlain;
    if (bytes > most && problem.empty()) problem = "emulate: " + std::to_string(bytes) + " bytes of shared memory in " + where();
    if (!problem.empty()) break;
  }
  running = 0, current = nullptr, pending.p = nullptr;
  if (!problem.empty()) fibers.clear();
  TORCH_CHECK(problem.empty(), problem);
}

// ---- Tensors' memory: known, and filled with NaN, so that what was never written is noticed ---------------------------

struct Allocator final : at::Allocator {
  static void free(void* p) {
    if (!p) return;
    memories.erase(static_cast<char*>(p));
    std::free(static_cast<char*>(p) - kRedZone);
  }
  at::DataPtr allocate(size_t bytes) override {
    char* p = static_cast<char*>(std::aligned_alloc(kRedZone, (bytes + 3 * kRedZone - 1) / kRedZone * kRedZone)) + kRedZone;
    std::memset(p, 0xff, bytes);
    memories[p] = {p, bytes};
    return {p, p, &free, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// Products of float16 with float32 results, which PyTorch has for CUDA only.
at::Tensor bmm_to(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) { return at::bmm(a.to(type), b.to(type)); }
at::Tensor& baddbmm_to(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType type, const at::Scalar& beta,
                       const at::Scalar& alpha, at::Tensor& out) {
  return at::baddbmm_out(out, self, a.to(type), b.to(type), beta, alpha);
}
TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("bmm.dtype", &bmm_to);
  m.impl("baddbmm.dtype_out", &baddbmm_to);
}

static Allocator allocator;
static const bool installed = (c10::SetCPUAllocator(&allocator, 255), true);

}  // namespace emulate

// ---- What -fsanitize=thread calls -------------------------------------------------------------------------------------

using emulate::access, emulate::Access;
#define R2O_HOOK(name, n, kind) \
  void name##n(void* p) { emulate::site = __builtin_return_address(0), access(p, n, kind); }
#define R2O_HOOKS(n)                               \
  R2O_HOOK(__tsan_read, n, Access::read)           \
  R2O_HOOK(__tsan_write, n, Access::write)         \
  R2O_HOOK(__tsan_unaligned_read, n, Access::read) \
  R2O_HOOK(__tsan_unaligned_write, n, Access::write)
#define R2O_ATOMICS(n, T)                                                                                   \
  T __tsan_atomic##n##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); }                     \
  void __tsan_atomic##n##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); }                     \
  T __tsan_atomic##n##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); }           \
  T __tsan_atomic##n##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); }           \
  T __tsan_atomic##n##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, 5); }           \
  T __tsan_atomic##n##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, 5); }             \
  T __tsan_atomic##n##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, 5); }           \
  int __tsan_atomic##n##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) { return __atomic_compare_exchange_n(p, e, v, 0, 5, 5); } \
  int __tsan_atomic##n##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) { return __atomic_compare_exchange_n(p, e, v, 1, 5, 5); }
extern "C" {
void r2o_emulate_order(int seed) { emulate::order = seed; }  // of threads and blocks: 0 forward, 1 backward, others shuffled
R2O_HOOKS(1)
R2O_HOOKS(2)
R2O_HOOKS(4)
R2O_HOOKS(8)
R2O_HOOKS(16)
R2O_ATOMICS(8, uint8_t)
R2O_ATOMICS(32, uint32_t)
R2O_ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) {}
void __tsan_read_range(void* p, size_t) { access(p, 1, Access::read); }
void __tsan_write_range(void* p, size_t) { access(p, 1, Access::write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
