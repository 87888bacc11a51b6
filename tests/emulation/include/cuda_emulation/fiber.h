// Fibers: stacks that one operating-system thread switches between.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

// Elsewhere, or on request, the C library switches, with a system call each time.
#if defined(__x86_64__) && !defined(CUDA_EMULATION_UCONTEXT)
#define CUDA_EMULATION_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATION_ASAN 1
#endif
#endif
#if defined(CUDA_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

// Where a suspended fiber, or the scheduler, goes on.
struct Context {
#if defined(CUDA_EMULATION_OWN_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack_bottom = nullptr;  // for AddressSanitizer, which follows the stacks
  std::size_t stack_size = 0;
  void* fake_stack = nullptr;
};

#if defined(CUDA_EMULATION_OWN_SWITCH)
// Saves what the calling convention lets a function rely on across a call, and takes the other stack. `jmp`
// instead of `ret`, whose target the processor would predict from the calls on the old stack, wrongly.
__attribute__((naked, noinline, noipa)) inline void switch_stacks(void** /*saved*/, void* /*resumed*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "popq %rcx\n jmp *%rcx\n");
}
#endif

inline Context* switched_from = nullptr;

inline void switch_context(Context& from, Context& to) {
  switched_from = &from;
#if defined(CUDA_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#if defined(CUDA_EMULATION_OWN_SWITCH)
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if defined(CUDA_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing that a new fiber does.
inline void enter_context() {
#if defined(CUDA_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &switched_from->stack_bottom, &switched_from->stack_size);
#endif
}

// A region of stacks, each above a page that faults when a stack overflows into it.
class Stacks {
 public:
  static constexpr std::size_t kStackSize = 64 * 1024;

  explicit Stacks(int count)
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))), bytes_(count * stride()) {
    void* base =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(base);
    for (int i = 0; i < count; ++i) mprotect(base_ + i * stride(), page_, PROT_NONE);
  }
  ~Stacks() { munmap(base_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  unsigned char* bottom(int i) const { return base_ + i * stride() + page_; }
  bool contains(const unsigned char* pointer) const { return pointer >= base_ && pointer < base_ + bytes_; }

  // The tops are staggered: at a stride of a power of two, the live ends of all stacks would share a few
  // cache sets.
  std::size_t size(int i) const { return kStackSize - (i * 5 % 32) * 128; }

 private:
  std::size_t stride() const { return page_ + kStackSize; }

  std::size_t page_, bytes_;
  unsigned char* base_;
};

// Makes `context` start in `entry`, which never returns, on the stack given.
inline void prepare(Context& context, unsigned char* bottom, std::size_t size, void (*entry)()) {
  context.stack_bottom = bottom;
  context.stack_size = size;
  context.fake_stack = nullptr;
#if defined(CUDA_EMULATION_ASAN)
  __asan_unpoison_memory_region(bottom, size);  // what an abandoned fiber left
#endif
#if defined(CUDA_EMULATION_OWN_SWITCH)
  auto** top = reinterpret_cast<void**>(bottom + size);
  *--top = nullptr;  // a return address: aligns the stack as after a call, and ends backtraces
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

}  // namespace cuda_emulation
