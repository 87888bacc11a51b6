// Runs one block after another, every thread of a block as a fiber. A thread runs until it waits or returns;
// which one follows is drawn from a seeded random sequence, or follows from their numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "accesses.h"
#include "fiber.h"
#include "random.h"
#include "shared_memory.h"
#include "watchdog.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuda_emulation {

inline constexpr int kMaxThreads = 1024;  // of a block

// What the emulation reports about a kernel: divergence, deadlock, a collective that lacks a lane.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call that makes threads wait for each other, and its place in the source.
struct Site {
  const char* call = nullptr;
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && (call == other.call || std::strcmp(call, other.call) == 0) &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const { return std::string(call) + " at " + file + ":" + std::to_string(line); }
};

struct Fiber;

enum class State { kReady, kAtBarrier, kInCollective, kFinished };

struct alignas(64) Thread {
  uint3 index;
  int warp, lane;
  State state;
  unsigned mask;  // the lanes of the collective in which it waits
  Fiber* fiber;   // null until it first runs
  Site site;      // where it waits
};

// Copies into shared memory that a thread has started and not waited for, oldest first.
struct AsyncCopies {
  struct Copy {
    void* shared;
    const void* global;
    int valid_bytes;
  };
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;  // the number of copies in each committed group
};

struct Warp {
  unsigned lanes;     // that exist
  unsigned finished;  // that have returned
  unsigned waiting;   // that wait in a collective
  void* operands[32];
};

struct Fiber {
  Context context;
  Thread* thread;
};

// The threads that can run, next first. A thread is in it once at most.
class ReadyQueue {
 public:
  bool empty() const { return first_ == end_; }
  void clear() { first_ = end_ = 0; }
  void push_front(Thread& thread) { items_[--first_ % kMaxThreads] = &thread; }
  void push_back(Thread& thread) { items_[end_++ % kMaxThreads] = &thread; }
  Thread* pop_front() { return items_[first_++ % kMaxThreads]; }

 private:
  Thread* items_[kMaxThreads] = {};
  unsigned first_ = 0, end_ = 0;
};

class Scheduler {
 public:
  // A kernel: `call(arguments)` runs `function` once.
  struct Kernel {
    const void* function;
    void (*call)(void*);
    void* arguments;
    std::size_t argument_bytes;
  };
  // Runs the kernel for every thread of every block. Throws Error.
  void run(dim3 grid, dim3 block, std::size_t dynamic_shared, const Kernel& kernel);

  // ---- called by the running thread ----

  CUDA_EMULATION_HOST_CODE Thread& current() {
    if (current_ == nullptr) throw Error("device code was called outside of a kernel");
    return *current_;
  }

  // Barrier of the whole block. Returns over how many threads the predicate holds.
  int barrier(bool predicate, const Site& site);

  // Barrier `id`, 1 to 15, of so many threads: whole warps, and in a block always the same.
  void barrier_of(int id, int threads, const Site& site);

  // Waits for all lanes of the mask to make the same call; then `perform` is called once with all their
  // operands.
  void collective(unsigned mask, void* operands, void (*perform)(void* const* operands, unsigned mask),
                  const Site& site);

  // What __syncwarp performs. Alone of the collectives it orders accesses to memory.
  static void warp_barrier(void* const*, unsigned) {}

  // The same for all 32 lanes, none of which may be missing.
  void whole_warp(void* operands, void (*perform)(void* const*, unsigned), const Site& site);

  // Asynchronous copies: `pc` is where the thread calls.
  void start_copy(void* shared, const void* global, int valid_bytes, const void* pc);
  void commit_copies();
  void wait_for_copies(int pending, const void* pc);  // until so many groups are under way

  // Lets other threads run: for what waits by asking again.
  void yield();
  void yield_sometimes();

  // Ends the launch with an error about the running thread.
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

  // ---- control ----

  void set_seed(std::uint64_t seed) {
    seed_ = seed;
    launches_ = 0;
  }
  // In natural order, blocks and threads run as they are numbered: nothing is drawn.
  void set_natural_order(bool natural) { natural_ = natural; }
  // The barrier in that line lets everybody pass, as if it had been forgotten. `file` is the end of a path;
  // line 0 forgets none.
  void forget_barrier(std::string file, int line) {
    forgotten_file_ = std::move(file);
    forgotten_line_ = line;
  }
  // Seconds of processor time that a thread may run without waiting or returning.
  void set_patience(double seconds) { patience_ = seconds; }
  std::uint64_t seed() const { return seed_; }
  std::uint64_t launches() const { return launches_; }
  std::uint64_t switches() const { return switches_; }

  Thread& lane(int i) { return threads_[current().warp * 32 + i]; }
  std::string thread_name(int i) const { return name(threads_[i]); }
  bool on_a_stack(const unsigned char* pointer) const { return stacks_ && stacks_->contains(pointer); }

 private:
  AsyncCopies& copies() { return copies_[&current() - threads_.data()]; }
  void ready_all();
  void ready_lanes(unsigned lanes, Thread* warp);
  void ready(Thread& thread, bool ahead = false);
  Thread* next();

  static void fiber_main();
  bool forgotten(const Site& site) const;
  void leave();
  void resume(Thread* thread, Fiber& from);
  Fiber& free_fiber(Thread* thread);
  void finish(Thread& thread);
  void run_block();
  void enter(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    accesses.begin_thread(static_cast<int>(&thread - threads_.data()));
    ++progress_;
  }

  const Thread& any_finished() const;
  static void lose_patience();
  static void fault();
  static std::string block_name();
  static std::string name(const Thread& thread);
  std::string deadlock() const;
#if defined(CUDA_EMULATION_ASAN)
  static void name_current();
#endif

  // The block that runs.
  int count_ = 0, finished_ = 0;
  std::vector<Thread> threads_ = std::vector<Thread>(kMaxThreads);
  std::vector<Warp> warps_ = std::vector<Warp>(kMaxThreads / 32);
  struct {
    int arrived = 0, holds = 0, result = 0;
    const Thread* first = nullptr;
  } barrier_;
  struct {
    int threads = 0;
    unsigned warps = 0;  // that have met in it; 0: none yet
    std::vector<Thread*> waiting;
  } named_barriers_[16];
  ReadyQueue ready_;
  std::vector<AsyncCopies> copies_ = std::vector<AsyncCopies>(kMaxThreads);
  Thread* current_ = nullptr;
  int stalled_ = 0;  // how often threads have yielded since one went on
  std::string error_;

  // Fibers outlive threads and blocks.
  std::unique_ptr<Stacks> stacks_;
  std::vector<Fiber> fibers_ = std::vector<Fiber>(kMaxThreads);
  std::vector<Fiber*> free_fibers_;
  int fibers_made_ = 0;
  Fiber* running_ = nullptr;
  Context main_;

  // The launch.
  std::mutex running_a_kernel_;
  Kernel kernel_{};
  Random random_;
  bool natural_ = false;
  std::vector<int> order_, warp_order_, lane_order_;
  std::uint64_t seed_ = 0, launches_ = 0, switches_ = 0, progress_ = 0;
  double patience_ = 30;
  std::string forgotten_file_;
  int forgotten_line_ = 0;
};

extern Scheduler scheduler;

}  // namespace cuda_emulation
