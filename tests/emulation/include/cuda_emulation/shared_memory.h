// Shared memory: the thread-local storage of the library that contains the kernels, since `__shared__` stands
// for `thread_local`. Dynamic shared memory is one buffer of it.
#pragma once

#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "fiber.h"

namespace cuda_emulation {
inline constexpr std::size_t kMaxSharedMemory = 256 * 1024;  // more than any chip has
}

// `extern __shared__ unsigned char name[]` declares a variable of the namespace around it. The linker is told
// that it is this one: -Wl,--defsym=<mangled name>=cuda_emulation_shared_memory. Some bytes in front of it
// stay unused.
asm(R"(
  .pushsection .tbss.cuda_emulation, "awTG", @nobits, cuda_emulation_shared_memory, comdat
  .balign 1024
  .zero 1024
  .weak cuda_emulation_shared_memory
  .hidden cuda_emulation_shared_memory
  .type cuda_emulation_shared_memory, %tls_object
  .size cuda_emulation_shared_memory, 262144
cuda_emulation_shared_memory:
  .zero 262144
  .popsection)");
extern "C" __attribute__((visibility("hidden"))) thread_local unsigned char cuda_emulation_shared_memory[];

namespace cuda_emulation {

class SharedMemory {
 public:
  // Before a launch: the bytes around the dynamic part become untouchable (under AddressSanitizer).
  void open(std::size_t dynamic_bytes) {
    find();
    dynamic_bytes_ = dynamic_bytes;
#if defined(CUDA_EMULATION_ASAN)
    __asan_poison_memory_region(dynamic_ - kFront, kFront);
    __asan_unpoison_memory_region(dynamic_, dynamic_bytes);
    __asan_poison_memory_region(dynamic_ + dynamic_bytes, kMaxSharedMemory - dynamic_bytes);
#endif
  }

  // What a block finds: bytes of ones, not-a-number in every floating-point type.
  void poison() {
    std::memset(begin_, 0xff, dynamic_ - kFront - begin_);
    std::memset(dynamic_, 0xff, dynamic_bytes_);
    unsigned char* behind = dynamic_ + kMaxSharedMemory;
    std::memset(behind, 0xff, end_ - behind);
  }

  unsigned char* dynamic() const { return dynamic_; }
  std::size_t dynamic_bytes() const { return dynamic_bytes_; }
  std::pair<const unsigned char*, const unsigned char*> all() const { return {begin_, end_}; }

  bool contains(const void* pointer, std::size_t bytes) const {
    auto* p = static_cast<const unsigned char*>(pointer);
    if (p >= dynamic_ - kFront && p < dynamic_ + kMaxSharedMemory)
      return p >= dynamic_ && p + bytes <= dynamic_ + dynamic_bytes_;
    return p >= begin_ && p + bytes <= end_;
  }

 private:
  static constexpr std::size_t kFront = 1024;

  // This library's thread-local storage in this operating-system thread.
  void find() {
    unsigned char* dynamic = cuda_emulation_shared_memory;
    if (dynamic == dynamic_) return;
    dynamic_ = dynamic;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
          auto* self = static_cast<SharedMemory*>(data);
          auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
          for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_TLS || self->dynamic_ < begin ||
                self->dynamic_ >= begin + segment.p_memsz)
              continue;
            self->begin_ = begin;
            self->end_ = begin + segment.p_memsz;
            return 1;
          }
          return 0;
        },
        this);
  }

  unsigned char *begin_ = nullptr, *end_ = nullptr, *dynamic_ = nullptr;
  std::size_t dynamic_bytes_ = 0;
};

extern SharedMemory block_memory;

}  // namespace cuda_emulation
