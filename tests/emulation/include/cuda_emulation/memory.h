// Loads and stores with cache hints, fences and atomics.
#pragma once

#include <cstdint>
#include <cstring>

#include "scheduler.h"

namespace cuda_emulation {

// Threads are not interrupted, so any operation is atomic. Whoever waits for another's by asking again lets
// it run.
template <typename T, typename Update>
CUDA_EMULATION_HOST_CODE T atomic(T* pointer, Update update) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % sizeof(T) != 0) accesses.misaligned(pointer, sizeof(T));
  const T old = *pointer;
  *pointer = update(old);
  scheduler.yield_sometimes();
  return old;
}

}  // namespace cuda_emulation

#define CUDA_EMULATION_LOAD(name) \
  template <typename T>           \
  T name(const T* pointer) {      \
    return *pointer;              \
  }
CUDA_EMULATION_LOAD(__ldg)
CUDA_EMULATION_LOAD(__ldca)
CUDA_EMULATION_LOAD(__ldcg)
CUDA_EMULATION_LOAD(__ldcs)
CUDA_EMULATION_LOAD(__ldcv)
CUDA_EMULATION_LOAD(__ldlu)
#undef CUDA_EMULATION_LOAD

#define CUDA_EMULATION_STORE(name) \
  template <typename T>            \
  void name(T* pointer, T value) { \
    *pointer = value;              \
  }
CUDA_EMULATION_STORE(__stcg)
CUDA_EMULATION_STORE(__stcs)
CUDA_EMULATION_STORE(__stwb)
CUDA_EMULATION_STORE(__stwt)
#undef CUDA_EMULATION_STORE

// What is copied or set at once, which no call of the compiler's tells of.
#if defined(__SANITIZE_THREAD__)
__attribute__((always_inline)) inline void* cuda_emulation_memcpy(void* to, const void* from,
                                                                  std::size_t bytes) {
  if (!__builtin_constant_p(bytes) || bytes > 4) cuda_emulation::accesses.copied(to, from, bytes);
  return __builtin_memcpy(to, from, bytes);
}
__attribute__((always_inline)) inline void* cuda_emulation_memmove(void* to, const void* from,
                                                                   std::size_t bytes) {
  cuda_emulation::accesses.copied(to, from, bytes);
  return __builtin_memmove(to, from, bytes);
}
__attribute__((always_inline)) inline void* cuda_emulation_memset(void* to, int value, std::size_t bytes) {
  cuda_emulation::accesses.copied(to, nullptr, bytes);
  return __builtin_memset(to, value, bytes);
}
namespace std {
using ::cuda_emulation_memcpy;
using ::cuda_emulation_memmove;
using ::cuda_emulation_memset;
}  // namespace std
#define memcpy(to, from, bytes) cuda_emulation_memcpy(to, from, bytes)
#define memmove(to, from, bytes) cuda_emulation_memmove(to, from, bytes)
#define memset(to, value, bytes) cuda_emulation_memset(to, value, bytes)
#endif

inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { cuda_emulation::scheduler.yield(); }
[[noreturn]] inline void __trap() { cuda_emulation::scheduler.fail("executes __trap()"); }

#define CUDA_EMULATION_ATOMIC(name, expression)                                      \
  template <typename T>                                                              \
  T name(T* pointer, std::common_type_t<T> value) {                                  \
    return cuda_emulation::atomic(pointer, [value](T old) { return (expression); }); \
  }
CUDA_EMULATION_ATOMIC(atomicAdd, old + value)
CUDA_EMULATION_ATOMIC(atomicSub, old - value)
CUDA_EMULATION_ATOMIC(atomicMin, old < value ? old : value)
CUDA_EMULATION_ATOMIC(atomicMax, old < value ? value : old)
CUDA_EMULATION_ATOMIC(atomicAnd, old& value)
CUDA_EMULATION_ATOMIC(atomicOr, old | value)
CUDA_EMULATION_ATOMIC(atomicXor, old ^ value)
CUDA_EMULATION_ATOMIC(atomicInc, old >= value ? T{0} : old + 1)
#undef CUDA_EMULATION_ATOMIC

template <typename T>
T atomicExch(T* pointer, std::common_type_t<T> value) {
  return cuda_emulation::atomic(pointer, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cuda_emulation::atomic(pointer, [=](T old) { return old == expected ? value : old; });
}
