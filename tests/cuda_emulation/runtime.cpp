// Runs a grid on the CPU: block by block, a block's threads as fibers. A warp's lanes run, in an order drawn from a seed, each
// until it has to wait; then another warp's; when all threads wait at the barrier, on they go in a new order.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation.h"
#include "fiber.h"
#include "log.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(pointer, size) ((void)(pointer), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(pointer, size) ((void)(pointer), (void)(size))
#endif

thread_local uint3 threadIdx __attribute__((tls_model("initial-exec")));
thread_local uint3 blockIdx __attribute__((tls_model("initial-exec")));
thread_local dim3 blockDim __attribute__((tls_model("initial-exec")));
thread_local dim3 gridDim __attribute__((tls_model("initial-exec")));

namespace emulation {

thread_local int lane __attribute__((tls_model("initial-exec")));

namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr std::size_t kMostShared = 227 * 1024, kWithoutAsking = 48 * 1024, kMargin = 4096;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStack = 256 * 1024;  // frames grow by redzones
#else
constexpr std::size_t kStack = 64 * 1024;
#endif

std::uint64_t environment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::strtoull(value, nullptr, 10) : otherwise;
}

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, size;
};

struct Lane {
  uint3 index;
  int number;  // within its warp
  Fiber fiber;
  std::vector<Copy> copies;         // begun, in order, and not yet waited for
  std::vector<std::size_t> groups;  // of which so many belong to each committed group; the rest is not committed
  std::size_t grouped = 0;
};

struct Warp {
  std::uint32_t ready, at_barrier, done, all;
  int arrived;
  const char* instruction;
  void* brought[kWarp];
};

// One thread of the operating system at work on a block.
class Engine {
 public:
  Engine() : lanes_(kMostThreads) {
    stacks_ = static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(128, kMostShared + 2 * kMargin + 1024)));
    if (!memory_) throw std::bad_alloc();
    shared_ = memory_.get() + kMargin;
  }

  ~Engine() {
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), kMostShared + 2 * kMargin);
    munmap(stacks_, kMostThreads * kStack);
  }

  // Empty, or what went wrong.
  std::string run(dim3 grid, dim3 size, std::uint64_t index, std::size_t shared, std::uint64_t seed,
                  const std::function<void()>& body) {
    body_ = &body;
    error_[0] = 0;
    copied_ = 0;
    shared_size_ = shared;
    const uint3 block{unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
    random_ = (seed + 1) * 0x9e3779b97f4a7c15u ^ (index + 1) * 0xd1342543de82ef95u;
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), kMostShared + 2 * kMargin);
    std::memset(memory_.get(), kPoison, shared + 2 * kMargin);
    ASAN_POISON_MEMORY_REGION(memory_.get(), kMargin);
    ASAN_POISON_MEMORY_REGION(shared_ + shared, kMargin);

    const int threads = int(size.x * size.y * size.z);
    warps_.assign((threads + kWarp - 1) / kWarp, {});
    for (int i = 0; i < threads; ++i) {
      Lane& lane = lanes_[i];
      lane.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      lane.number = i % kWarp;
      lane.copies.clear();
      lane.groups.clear();
      lane.grouped = 0;
      lane.fiber.stack = stacks_ + i * kStack;
      lane.fiber.size = kStack;
      ASAN_UNPOISON_MEMORY_REGION(lane.fiber.stack, kStack);  // of what ran on it before
      prepare(lane.fiber, &Engine::begin);
      warps_[i / kWarp].all |= 1u << lane.number;
    }
    for (Warp& warp : warps_) warp.ready = warp.all;
    order_.resize(warps_.size());
    std::iota(order_.begin(), order_.end(), 0);
    shuffle();
    launcher_.stack = nullptr;
    blockIdx = block;
    blockDim = size;
    gridDim = grid;
    enter(*pick(), launcher_);
    if (!*error_) check_margins();
    if (!*error_) return {};
    return std::string(error_) + " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
           std::to_string(block.z) + ")";
  }

  void barrier() {
    Lane& lane = me();
    warp_of(lane).at_barrier |= 1u << lane.number;
    wait();
  }

  void collective(const char* instruction, void* brought, void (*run)(void* const (&)[kWarp])) {
    Lane& lane = me();
    Warp& warp = warp_of(lane);
    if (warp.arrived == 0) {
      warp.instruction = instruction;
    } else if (warp.instruction != instruction && std::strcmp(warp.instruction, instruction) != 0) {
      fail("lanes of one warp meet at %s and at %s", warp.instruction, instruction);
    }
    if (warp.done || warp.all != ~0u) fail("a lane that is not there is waited for at %s", instruction);
    warp.brought[lane.number] = brought;
    if (++warp.arrived == kWarp) {
      run(warp.brought);
      warp.arrived = 0;
      warp.ready |= ~(1u << lane.number);
      if (random() % 32 == 0) {  // now and then another warp comes between
        warp.ready |= 1u << lane.number;
        position_ = random() % order_.size();
        wait();
      }
    } else {
      wait();
    }
  }

  void copy(void* to, const void* from, int bytes, int size) {
    check_shared("cp.async", to, size, size);
    if (bytes < 0 || bytes > size) fail("cp.async: more bytes asked for than a copy has");
    if (reinterpret_cast<std::uintptr_t>(from) % size) fail("cp.async: the global address is not aligned");
    std::memset(to, kPoison, size);
    me().copies.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, size});
    copied_ += bytes;
  }

  void commit() {
    Lane& lane = me();
    lane.groups.push_back(lane.copies.size() - lane.grouped);
    lane.grouped = lane.copies.size();
  }

  void wait_for_copies(int pending) {
    Lane& lane = me();
    std::size_t finished = 0;
    const std::size_t groups = lane.groups.size() > std::size_t(pending) ? lane.groups.size() - pending : 0;
    for (std::size_t g = 0; g < groups; ++g) finished += lane.groups[g];
    for (std::size_t c = 0; c < finished; ++c) {
      const Copy& copy = lane.copies[c];
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
    }
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + finished);
    lane.groups.erase(lane.groups.begin(), lane.groups.begin() + groups);
    lane.grouped -= finished;
  }

  void check_shared(const char* instruction, const void* pointer, std::size_t bytes, std::size_t alignment) {
    const auto* at = static_cast<const unsigned char*>(pointer);
    if (at < shared_ || at + bytes > shared_ + shared_size_) {
      fail("%s: byte %td is outside the block's %zu bytes of shared memory", instruction, at - shared_, shared_size_);
    }
    if (std::size_t(at - shared_) % alignment) fail("%s: the shared address is not aligned", instruction);
  }

  // Leaves the thread as it is: whatever lies on its stack is never destroyed, so the message is made in place.
  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    std::va_list values;
    va_start(values, format);
    const std::size_t length = std::min<std::size_t>(std::vsnprintf(error_, sizeof error_, format, values), 400);
    va_end(values);
    const uint3 at = me().index;
    std::snprintf(error_ + length, sizeof error_ - length, ", thread %u, %u, %u", at.x, at.y, at.z);
    switch_to(me().fiber, launcher_, true);
    std::abort();
  }

  unsigned char* shared() { return shared_; }
  std::uint64_t copied() const { return copied_; }

  static Engine& mine() {
    static thread_local Engine engine;
    return engine;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  Lane& me() { return *running_; }
  Warp& warp_of(const Lane& lane) { return warps_[(&lane - lanes_.data()) / kWarp]; }

  std::uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    return random_ ^= random_ << 17;
  }

  void shuffle() {
    for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random() % i]);
    position_ = 0;
    turn_ = random() % kWarp;
  }

  static void begin() {
    Engine& engine = mine();
    started(engine.launcher_);
    (*engine.body_)();
    Lane& lane = engine.me();
    if (!lane.copies.empty()) engine.fail("the kernel returns with asynchronous copies that were not waited for");
    engine.warp_of(lane).done |= 1u << lane.number;
    Lane* next = engine.pick();
    if (next) engine.enter(*next, lane.fiber, true);
    switch_to(lane.fiber, engine.launcher_, true);
    std::abort();
  }

  void enter(Lane& next, Fiber& from, bool for_good = false) {
    running_ = &next;
    threadIdx = next.index;
    emulation::lane = next.number;
    switch_to(from, next.fiber, for_good);
  }

  void wait() {
    Lane& lane = me();
    Lane* next = pick();
    if (next == &lane) return;
    if (next) return enter(*next, lane.fiber);
    switch_to(lane.fiber, launcher_, true);
  }

  // The lane that runs next; null where the block has ended or failed.
  Lane* pick() {
    for (;;) {
      for (std::size_t i = 0; i < order_.size(); ++i) {
        const int w = order_[position_];
        Warp& warp = warps_[w];
        if (warp.ready) {
          const std::uint32_t turned = (warp.ready >> turn_) | (turn_ ? warp.ready << (kWarp - turn_) : 0);
          const int lane = (__builtin_ctz(turned) + turn_) % kWarp;
          warp.ready &= ~(1u << lane);
          return &lanes_[w * kWarp + lane];
        }
        position_ = position_ + 1 == order_.size() ? 0 : position_ + 1;
      }
      bool ended = true, together = true;
      for (const Warp& warp : warps_) {
        ended &= warp.done == warp.all;
        together &= (warp.done | warp.at_barrier) == warp.all;
      }
      if (ended) return nullptr;
      if (!together) {
        report_deadlock();
        return nullptr;
      }
      for (Warp& warp : warps_) {
        warp.ready = warp.at_barrier;
        warp.at_barrier = 0;
      }
      shuffle();
    }
  }

  void report_deadlock() {
    int at_barrier = 0, done = 0, collective = 0;
    const char* where = "";
    for (const Warp& warp : warps_) {
      at_barrier += __builtin_popcount(warp.at_barrier);
      done += __builtin_popcount(warp.done);
      collective += warp.arrived;
      if (warp.arrived) where = warp.instruction;
    }
    std::snprintf(error_, sizeof error_,
                  "no thread can go on: %d wait at __syncthreads, %d at a warp's %s, %d have returned", at_barrier,
                  collective, *where ? where : "instruction", done);
  }

  // The margins around shared memory hold what they were filled with.
  void check_margins() {
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), kMargin);
    ASAN_UNPOISON_MEMORY_REGION(shared_ + shared_size_, kMargin);
    for (std::size_t i = 0; i < kMargin; ++i) {
      const bool below = memory_.get()[i] != kPoison, above = shared_[shared_size_ + i] != kPoison;
      if (!below && !above) continue;
      const long at = below ? long(i) - long(kMargin) : long(shared_size_ + i);
      std::snprintf(error_, sizeof error_, "byte %ld, outside the block's %zu bytes of shared memory, was written", at,
                    shared_size_);
      return;
    }
  }

  std::vector<Lane> lanes_;
  Lane* running_ = nullptr;
  std::vector<Warp> warps_;
  std::vector<int> order_;  // of the warps, until the next barrier
  std::size_t position_ = 0;
  int turn_ = 0;  // the lane that comes first
  unsigned char* stacks_;
  std::unique_ptr<unsigned char, Free> memory_;
  unsigned char* shared_;
  std::size_t shared_size_ = 0;
  std::uint64_t random_ = 1, copied_ = 0;
  Fiber launcher_{};
  const std::function<void()>* body_ = nullptr;
  char error_[512];
};

std::mutex guard;
std::unordered_map<const void*, int>& allowances() {
  static std::unordered_map<const void*, int> kernels;
  return kernels;
}

std::string& last_message() {
  static thread_local std::string text;
  return text;
}

bool refuse(std::string why) {
  last_message() = std::move(why);
  return false;
}

}  // namespace

void barrier() { Engine::mine().barrier(); }
void collective(const char* instruction, void* brought, void (*run)(void* const (&)[32])) {
  Engine::mine().collective(instruction, brought, run);
}
unsigned char* shared_memory() { return Engine::mine().shared(); }
void check_shared(const char* instruction, const void* pointer, std::size_t bytes, std::size_t alignment) {
  Engine::mine().check_shared(instruction, pointer, bytes, alignment);
}
void copy_async(void* shared, const void* global, int bytes, int size) {
  Engine::mine().copy(shared, global, bytes, size);
}
void commit_copies() { Engine::mine().commit(); }
void wait_copies(int pending) { Engine::mine().wait_for_copies(pending); }
void fail(const char* message) { Engine::mine().fail("%s", message); }

bool allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || std::size_t(bytes) > kMostShared) {
    return refuse(std::to_string(bytes) + " bytes of shared memory asked for, there are " +
                  std::to_string(kMostShared));
  }
  const std::lock_guard lock(guard);
  int& allowed = allowances()[kernel];
  allowed = std::max(allowed, bytes);
  return true;
}

bool launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& body) {
  const std::uint64_t threads = std::uint64_t(block.x) * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads) return refuse(std::to_string(threads) + " threads in a block");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                  std::to_string(grid.z) + " blocks");
  }
  std::size_t allowed = kWithoutAsking;
  {
    const std::lock_guard lock(guard);
    if (const auto found = allowances().find(kernel); found != allowances().end()) {
      allowed = std::max<std::size_t>(allowed, found->second);
    }
  }
  if (shared > allowed) {
    return refuse(std::to_string(shared) +
                  " bytes of shared memory without cudaFuncSetAttribute, or beyond what it set");
  }
  const Logged logged = log_launch(kernel, grid, block, shared);
  if (logged == Logged::instead) return true;

  const std::uint64_t seed = environment("CROSSVIT_KERNELS_EMULATE_SEED", 0);
  std::uint64_t copied = 0;
  std::string failure;
#pragma omp parallel for schedule(dynamic) reduction(+ : copied) if (blocks > 1)
  for (std::int64_t index = 0; index < std::int64_t(blocks); ++index) {
    {
      const std::lock_guard lock(guard);
      if (!failure.empty()) continue;
    }
    Engine& engine = Engine::mine();
    std::string error = engine.run(grid, block, index, shared, seed, body);
    copied += engine.copied();
    if (!error.empty()) {
      const std::lock_guard lock(guard);
      if (failure.empty()) failure = kernel_name(kernel) + ": " + error;
    }
  }
  if (logged == Logged::beside) log_copied(copied);
  return failure.empty() || refuse(failure);
}

const char* message() { return last_message().c_str(); }

}  // namespace emulation
