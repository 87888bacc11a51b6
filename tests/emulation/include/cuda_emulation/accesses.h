// What every load and store of a kernel passes: the compiler calls a function before each (-fsanitize=thread,
// without that sanitizer's runtime). It finds races in shared memory by rule, whatever the order of threads,
// and misaligned accesses; and on request it counts what an access costs.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// For code of the emulation that stands in headers: it is no part of a kernel.
#define CUDA_EMULATION_HOST_CODE __attribute__((no_sanitize("thread")))

#define CUDA_EMULATION_HIDDEN extern "C" __attribute__((visibility("hidden")))

namespace cuda_emulation {

// What the requests of one line of a kernel cost; a request is one access of a warp. In shared memory a
// wavefront is what the 32 banks deliver at a time; in global memory a sector has 32 bytes.
struct Cost {
  std::string kernel, line;
  bool shared = false;
  std::uint64_t requests = 0;
  std::uint64_t transactions = 0;  // wavefronts or sectors
  std::uint64_t ideal = 0;         // of these, for the same bytes side by side
};

class Accesses {
 public:
  // ---- called by the scheduler ----

  void open(const void* kernel, const void* arguments, std::size_t argument_bytes);
  void begin_block();
  void end_block();
  void begin_thread(int thread) { thread_ = thread; }
  void barrier() { ++epoch_; }
  void warp_barrier(int warp, unsigned lanes);
  void barrier_of_warps(unsigned warps);

  // ---- called by the kernel ----

  void access(const void* pointer, std::size_t bytes, bool write, const void* pc) {
    if (inside()) visit(static_cast<const unsigned char*>(pointer), bytes, write, pc);
  }
  // A cp.async has started: until it is finished nobody may touch the 16 bytes.
  void start_copy(const void* shared, const void* global, int valid_bytes, const void* pc);
  void finish_copy(const void* shared, const void* pc);
  void misaligned(const void* pointer, std::size_t bytes);
  void copied(const void* to, const void* from, std::size_t bytes);  // from null: set

  // ---- costs ----

  // Forgets what was counted; from here on counts in the first block of every launch, or not.
  void count(bool counting);
  std::vector<Cost> costs() const;

 private:
  // What has happened to some bytes. Epochs are numbered by the barriers of blocks, and times within them by
  // those of warps: an access has the time of the last one that its warp has passed.
  struct Cell {
    std::uint32_t write_epoch = 0, write_time = 0, write_pc = 0;
    std::uint32_t read_epoch = 0, read_time = 0, read_pc = 0;
    std::uint32_t readers = 0;  // the lanes of read_warp, or warps, that have read without a barrier since
    std::uint16_t writer = 0;
    std::uint8_t read_warp = 0;
    bool several = false;  // readers are warps
  };
  struct Shadow;
  struct Request {
    std::uintptr_t addresses[32];
    std::uint32_t lanes = 0;
    std::uint8_t bytes = 0;
    bool shared = false;
  };

  // Whether a kernel runs, and it is this thread of the operating system that runs it: others may launch
  // meanwhile.
  bool inside() const { return thread_ >= 0 && pthread_equal(pthread_self(), owner_); }
  void visit(const unsigned char* pointer, std::size_t bytes, bool write, const void* pc);
  void visit_shared(std::size_t offset, std::size_t bytes, bool write, std::uint32_t pc);
  bool ordered(int lane, std::uint32_t time) const { return known_[thread_ / 32][thread_ % 32][lane] > time; }
  bool warp_ordered(int warp, std::uint32_t time) const { return known_warps_[thread_ / 32][warp] > time; }
  std::uint32_t* read_times(const Cell& cell);  // by warp, where several have read
  void check(const Cell& cell, bool write, std::uint32_t pc);
  void record(Cell& cell, bool write, std::uint32_t pc);
  void check_copy(std::size_t word, std::uint32_t pc);
  [[noreturn]] void race(bool write, std::uint32_t pc, int other, const char* others, bool wrote,
                         std::uint32_t other_pc);
  void note(std::uintptr_t pointer, std::size_t bytes, bool shared, std::uint32_t pc);
  static std::uint32_t relative(const void* pc);

  int thread_ = -1;  // that runs; -1: none
  pthread_t owner_{};
  std::uint32_t epoch_ = 0, block_ = 0, time_ = 0;
  std::uint32_t times_of_warps_[32] = {};
  std::uint32_t known_[32][32][32] = {};    // of a warp: up to when a lane has what another did behind it
  std::uint32_t known_warps_[32][32] = {};  // up to when a warp has what another did behind it
  std::shared_ptr<Shadow> shadow_;
  const unsigned char *shared_begin_ = nullptr, *shared_end_ = nullptr;

  // Of the launch whose requests are counted.
  bool counting_ = false, counted_ = false;
  std::uint32_t kernel_ = 0;
  std::pair<std::uintptr_t, std::uintptr_t> arguments_;
  std::unordered_map<std::uint64_t, std::uint32_t> times_;               // a thread was at an address
  std::map<std::pair<std::uint64_t, std::uint32_t>, Request> requests_;  // by warp and address, and time
  using Line = std::pair<std::uint32_t, bool>;                           // address, in shared memory
  std::map<std::pair<std::uint32_t, Line>, Cost> costs_;                 // by kernel and line
};

extern Accesses accesses;

// A function and a line of the source for every address of this library, as Accesses keeps them.
std::vector<std::pair<std::string, std::string>> symbols(const std::vector<std::uint32_t>& addresses);
// The text with lines of the source in place of addresses, "@0x12ab".
std::string with_lines(const std::string& text);

}  // namespace cuda_emulation
