// Included by emulation.cpp.
#pragma once

#include "scheduler.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim{}, gridDim{};

namespace cuda_emulation {

SharedMemory block_memory;
Scheduler scheduler;

// ---- waiting --------------------------------------------------------------------------------------------

bool Scheduler::forgotten(const Site& site) const {
  if (site.line != forgotten_line_) return false;
  const std::string file = site.file;
  return file.size() >= forgotten_file_.size() &&
         file.compare(file.size() - forgotten_file_.size(), std::string::npos, forgotten_file_) == 0;
}

int Scheduler::barrier(bool predicate, const Site& site) {
  if (forgotten(site)) return predicate;
  Thread& self = current();
  self.state = State::kAtBarrier;
  self.site = site;
  if (finished_ > 0)
    fail("waits in %s, but %s has returned", site.text().c_str(), name(any_finished()).c_str());
  if (barrier_.arrived == 0) barrier_.first = &self;
  const Thread& first = *barrier_.first;
  if (!(first.site == site))
    fail("waits in %s while %s waits in %s", site.text().c_str(), name(first).c_str(),
         first.site.text().c_str());
  barrier_.holds += predicate;
  if (++barrier_.arrived == count_) {
    barrier_.result = barrier_.holds;
    barrier_.arrived = barrier_.holds = 0;
    accesses.barrier();
    ready_all();
  }
  leave();
  return barrier_.result;
}

void Scheduler::barrier_of(int id, int threads, const Site& site) {
  if (forgotten(site)) return;
  Thread& self = current();
  self.state = State::kAtBarrier;
  self.site = site;
  if (id < 1 || id > 15 || threads < 32 || threads > count_ || threads % 32 != 0)
    fail("calls %s as barrier %d of %d threads", site.text().c_str(), id, threads);
  auto& barrier = named_barriers_[id];
  if (barrier.waiting.empty()) barrier.threads = threads;
  const Thread& first = barrier.waiting.empty() ? self : *barrier.waiting[0];
  if (barrier.threads != threads)
    fail("waits in %s with %d threads while %s waits with %d", site.text().c_str(), threads,
         name(first).c_str(), barrier.threads);
  if (!(first.site == site))
    fail("waits in %s while %s waits in %s", site.text().c_str(), name(first).c_str(),
         first.site.text().c_str());
  barrier.waiting.push_back(&self);
  if (static_cast<int>(barrier.waiting.size()) < threads) return leave();

  unsigned warps = 0;
  for (const Thread* thread : barrier.waiting) warps |= 1u << thread->warp;
  if (32 * __builtin_popcount(warps) != threads)
    fail("waits in %s with a part of a warp", site.text().c_str());
  if (barrier.warps != 0 && barrier.warps != warps)
    fail("waits in %s, barrier %d, in which other warps have met", site.text().c_str(), id);
  barrier.warps = warps;
  accesses.barrier_of_warps(warps);
  stalled_ = 0;
  if (!natural_) random_.shuffle(barrier.waiting.begin(), static_cast<std::uint32_t>(barrier.waiting.size()));
  for (Thread* thread : barrier.waiting) ready(*thread);
  barrier.waiting.clear();
  leave();
}

void Scheduler::collective(unsigned mask, void* operands, void (*perform)(void* const*, unsigned),
                           const Site& site) {
  if (perform == warp_barrier && forgotten(site)) return;
  Thread& self = current();
  Warp& warp = warps_[self.warp];
  mask &= warp.lanes;
  if (!(mask >> self.lane & 1))
    fail("calls %s, whose mask 0x%08x lacks this lane, %d", site.text().c_str(), mask, self.lane);
  if (mask & warp.finished) {
    const Thread& gone = lane(__builtin_ctz(mask & warp.finished));
    fail("waits in %s for lane %d, but %s has returned", site.text().c_str(), gone.lane, name(gone).c_str());
  }
  self.state = State::kInCollective;
  self.site = site;
  self.mask = mask;
  warp.operands[self.lane] = operands;
  warp.waiting |= 1u << self.lane;
  if ((warp.waiting & mask) != mask) return leave();

  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const Thread& other = lane(__builtin_ctz(rest));
    if (other.mask != mask || !(other.site == site))
      fail("calls %s with the mask 0x%08x while %s calls %s with the mask 0x%08x", site.text().c_str(), mask,
           name(other).c_str(), other.site.text().c_str(), other.mask);
  }
  perform(warp.operands, mask);
  if (perform == warp_barrier) accesses.warp_barrier(self.warp, mask);
  warp.waiting &= ~mask;
  self.state = State::kReady;
  ready_lanes(mask & ~(1u << self.lane), &lane(0));
}

void Scheduler::whole_warp(void* operands, void (*perform)(void* const*, unsigned), const Site& site) {
  if (warps_[current().warp].lanes != 0xffffffff)
    fail("calls %s in a warp of fewer than 32 threads", site.text().c_str());
  collective(0xffffffff, operands, perform, site);
}

void Scheduler::yield_sometimes() {
  if (natural_ || random_.below(8) == 0) yield();
}

void Scheduler::yield() {
  constexpr int kLimit = 1'000'000;
  if (++stalled_ > kLimit) fail("waits for a value that no thread changes; neither does any other go on");
  ready_.push_back(current());
  leave();
}

// ---- asynchronous copies --------------------------------------------------------------------------------

// Until a wait the data are not there, and what was there is lost.
void Scheduler::start_copy(void* shared, const void* global, int valid_bytes, const void* pc) {
#if defined(CUDA_EMULATION_ASAN)
  const auto* source = static_cast<const volatile unsigned char*>(global);  // the access is reported here
  if (valid_bytes > 0) (void)source[0], (void)source[valid_bytes - 1];
#endif
  accesses.start_copy(shared, global, valid_bytes, pc);
  std::memset(shared, 0xff, 16);
  copies().copies.push_back({shared, global, valid_bytes});
}

void Scheduler::commit_copies() {
  AsyncCopies& pending = copies();
  std::size_t earlier = 0;
  for (const std::size_t copies : pending.groups) earlier += copies;
  pending.groups.push_back(pending.copies.size() - earlier);
}

void Scheduler::wait_for_copies(int groups, const void* pc) {
  AsyncCopies& pending = copies();
  while (pending.groups.size() > static_cast<std::size_t>(groups)) {
    const auto count = static_cast<std::ptrdiff_t>(pending.groups.front());
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      const AsyncCopies::Copy& copy = pending.copies[i];
      auto* shared = static_cast<unsigned char*>(copy.shared);
      std::memcpy(shared, copy.global, copy.valid_bytes);
      std::memset(shared + copy.valid_bytes, 0, 16 - copy.valid_bytes);
      accesses.finish_copy(shared, pc);
    }
    pending.copies.erase(pending.copies.begin(), pending.copies.begin() + count);
    pending.groups.erase(pending.groups.begin());
  }
}

// ---- who runs next --------------------------------------------------------------------------------------

// All threads of the block become ready: in any order, or a warp at a time.
void Scheduler::ready_all() {
  stalled_ = 0;
  const int warps = (count_ + 31) / 32;
  if (natural_) {
    for (int i = 0; i < count_; ++i) ready(threads_[i]);
    return;
  }
  if (random_.below(2) == 0) {
    random_.shuffle(order_.begin(), count_);
    for (int i = 0; i < count_; ++i) ready(threads_[order_[i]]);
    return;
  }
  random_.shuffle(warp_order_.begin(), warps);
  for (int i = 0; i < warps; ++i) {
    const int first = warp_order_[i] * 32, lanes = std::min(32, count_ - first);
    random_.shuffle(lane_order_.begin(), 32);
    for (int lane : lane_order_)
      if (lane < lanes) ready(threads_[first + lane]);
  }
}

// The lanes of a warp become ready: they run at once, ahead of the other warps, or after those.
void Scheduler::ready_lanes(unsigned lanes, Thread* warp) {
  stalled_ = 0;
  const bool ahead = !natural_ && random_.below(2) == 0;
  if (!natural_) random_.shuffle(lane_order_.begin(), 32);
  for (int lane : lane_order_)
    if (lanes >> lane & 1) ready(warp[lane], ahead);
}

void Scheduler::ready(Thread& thread, bool ahead) {
  thread.state = State::kReady;
  if (ahead)
    ready_.push_front(thread);
  else
    ready_.push_back(thread);
}

Thread* Scheduler::next() { return ready_.empty() ? nullptr : ready_.pop_front(); }

// ---- fibers ---------------------------------------------------------------------------------------------

// The current thread waits, or is ready again: others run before this returns.
void Scheduler::leave() {
  Thread& self = *current_;
  Fiber& fiber = *running_;
  self.fiber = &fiber;
  Thread* other = next();
  if (other != &self) resume(other, fiber);
  enter(self);
}

// Without a thread that could go on, back to run_block().
void Scheduler::resume(Thread* thread, Fiber& from) {
  if (thread == nullptr) return switch_context(from.context, main_);
  if (thread->fiber == nullptr) thread->fiber = &free_fiber(thread);
  running_ = thread->fiber;
  ++switches_;
  switch_context(from.context, running_->context);
}

// A fiber runs one thread after another; as long as none of them waits it serves them all.
void Scheduler::fiber_main() {
  enter_context();
  Scheduler& s = scheduler;
  Fiber& self = *s.running_;
  for (;;) {
    Thread& thread = *self.thread;
    s.enter(thread);
    try {
      s.kernel_.call(s.kernel_.arguments);
    } catch (const std::exception& error) {
      s.fail("threw an exception: %s", error.what());
    }
    s.finish(thread);
    Thread* following = s.next();
    if (following != nullptr && following->fiber == nullptr) {
      self.thread = following;
      continue;
    }
    s.free_fibers_.push_back(&self);
    s.resume(following, self);
  }
}

Fiber& Scheduler::free_fiber(Thread* thread) {
  if (free_fibers_.empty()) {
    if (!stacks_) stacks_ = std::make_unique<Stacks>(kMaxThreads);
    const int i = fibers_made_++;
    prepare(fibers_[i].context, stacks_->bottom(i), stacks_->size(i), fiber_main);
    free_fibers_.push_back(&fibers_[i]);
  }
  Fiber& fiber = *free_fibers_.back();
  free_fibers_.pop_back();
  fiber.thread = thread;
  return fiber;
}

void Scheduler::finish(Thread& thread) {
  stalled_ = 0;
  thread.state = State::kFinished;
  ++finished_;
  Warp& warp = warps_[thread.warp];
  warp.finished |= 1u << thread.lane;
  if (barrier_.arrived > 0)
    fail("returned while %s waits in %s", name(*barrier_.first).c_str(), barrier_.first->site.text().c_str());
  for (unsigned waiting = warp.waiting; waiting != 0; waiting &= waiting - 1) {
    const Thread& other = lane(__builtin_ctz(waiting));
    if (other.mask >> thread.lane & 1)
      fail("returned while %s waits for it in %s", name(other).c_str(), other.site.text().c_str());
  }
}

// ---- blocks and launches --------------------------------------------------------------------------------

void Scheduler::run(dim3 grid, dim3 block, std::size_t dynamic_shared, const Kernel& kernel) {
  const std::lock_guard lock(running_a_kernel_);
  random_ = Random(scatter(seed_) + ++launches_);
  gridDim = grid;
  blockDim = block;
  kernel_ = kernel;
  block_memory.open(dynamic_shared);
  accesses.open(kernel.function, kernel.arguments, kernel.argument_bytes);
#if defined(CUDA_EMULATION_ASAN)
  __sanitizer_set_death_callback(name_current);
#endif

  count_ = static_cast<int>(block.x * block.y * block.z);
  order_.resize(count_);
  for (int i = 0; i < count_; ++i) {
    const unsigned x = i % block.x, y = i / block.x % block.y, z = i / (block.x * block.y);
    threads_[i].index = {x, y, z};
    threads_[i].warp = i / 32;
    threads_[i].lane = i % 32;
    order_[i] = i;
  }
  warp_order_.resize((count_ + 31) / 32);
  std::iota(warp_order_.begin(), warp_order_.end(), 0);
  lane_order_.resize(32);
  std::iota(lane_order_.begin(), lane_order_.end(), 0);

  std::vector<std::uint32_t> blocks(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (!natural_) random_.shuffle(blocks.begin(), static_cast<std::uint32_t>(blocks.size()));
  const Watchdog watchdog(patience_, progress_, lose_patience);
#if !defined(CUDA_EMULATION_ASAN)
  const FaultGuard guard(fault);
#endif
  for (const std::uint32_t i : blocks) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    block_memory.poison();
    run_block();
  }
}

void Scheduler::run_block() {
  for (int i = 0; i < count_; ++i) {
    threads_[i].fiber = nullptr;
    copies_[i].copies.clear();
    copies_[i].groups.clear();
  }
  for (int i = 0; i * 32 < count_; ++i) {
    const int lanes = std::min(32, count_ - i * 32);
    warps_[i] = Warp{0xffffffffu >> (32 - lanes), 0, 0, {}};
  }
  finished_ = 0;
  barrier_ = {};
  for (auto& barrier : named_barriers_) barrier.warps = 0, barrier.waiting.clear();
  accesses.begin_block();
  ready_all();
  Thread* first = next();
  first->fiber = &free_fiber(first);
  running_ = first->fiber;
  switch_context(main_, running_->context);
  current_ = nullptr;
  accesses.end_block();
  if (error_.empty() && finished_ == count_) return;

  const std::string error = with_lines(error_.empty() ? deadlock() : error_);
  error_.clear();
  ready_.clear();
  free_fibers_.clear();  // whatever the others were doing, they are started afresh
  fibers_made_ = 0;
  throw Error(error);
}

// ---- errors ---------------------------------------------------------------------------------------------

void Scheduler::fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error_ = block_name() + ", " + name(current()) + " " + text;
  switch_context(running_->context, main_);
  __builtin_unreachable();
}

void Scheduler::lose_patience() {
  if (scheduler.current_ != nullptr)
    scheduler.fail(
        "runs on and on, without waiting or returning: does it wait for a plain variable to change?");
}

void Scheduler::fault() {
  if (scheduler.current_ != nullptr)
    scheduler.fail(
        "accesses memory that is not there, or is not aligned as its type is; or its stack is full");
}

const Thread& Scheduler::any_finished() const {
  int i = 0;
  while (threads_[i].state != State::kFinished) ++i;
  return threads_[i];
}

std::string Scheduler::block_name() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string Scheduler::name(const Thread& thread) {
  const uint3 i = thread.index;
  return "thread (" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

#if defined(CUDA_EMULATION_ASAN)
// Ends AddressSanitizer's report.
void Scheduler::name_current() {
  if (scheduler.current_ == nullptr) return;
  std::fprintf(stderr, "in %s, %s\n", block_name().c_str(), name(*scheduler.current_).c_str());
}
#endif

// One line for every place where threads wait.
std::string Scheduler::deadlock() const {
  std::string text = block_name() + ": deadlock, no thread can go on";
  std::vector<bool> told(count_, false);
  for (int i = 0; i < count_; ++i) {
    const Thread& thread = threads_[i];
    if (told[i] || thread.state == State::kFinished) continue;
    int others = -1;
    for (int j = i; j < count_; ++j)
      if (threads_[j].state == thread.state && threads_[j].site == thread.site) told[j] = true, ++others;
    text += "; " + name(thread) + " waits in " + thread.site.text();
    if (others > 0) text += ", with " + std::to_string(others) + " others";
  }
  return text;
}

}  // namespace cuda_emulation
