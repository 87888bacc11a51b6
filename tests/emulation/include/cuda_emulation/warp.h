// Barriers and warp-wide functions. Every one knows the line that called it, for the error messages.
#pragma once

#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define CUDA_EMULATION_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- the block ------------------------------------------------------------------------------------------

inline void __syncthreads(CUDA_EMULATION_CALLER) {
  cuda_emulation::scheduler.barrier(true, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, CUDA_EMULATION_CALLER) {
  return cuda_emulation::scheduler.barrier(predicate != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_and(int predicate, CUDA_EMULATION_CALLER) {
  return cuda_emulation::scheduler.barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline int __syncthreads_or(int predicate, CUDA_EMULATION_CALLER) {
  return cuda_emulation::scheduler.barrier(predicate != 0, {"__syncthreads_or", file, line}) != 0;
}

// ---- the warp -------------------------------------------------------------------------------------------

namespace cuda_emulation {

// A collective gets a function of the operands of all lanes; only those of the mask are there.

template <typename T>
struct Shuffled {
  T value, result;
  int source;  // the lane to read; its own where the source is out of range
};

template <typename T>
CUDA_EMULATION_HOST_CODE void perform_shuffle(void* const* operands, unsigned mask) {
  const auto lanes = reinterpret_cast<Shuffled<T>* const*>(operands);
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    Shuffled<T>& lane = *lanes[__builtin_ctz(rest)];
    if (mask >> lane.source & 1)
      lane.result = lanes[lane.source]->value;
    else  // undefined on the hardware
      __builtin_memset(static_cast<void*>(&lane.result), 0xff, sizeof(T));
  }
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Shuffled<T> operand{value, value, source};
  scheduler.collective(mask, &operand, perform_shuffle<T>, site);
  return operand.result;
}

struct Vote {
  bool predicate;
  unsigned result;
};

CUDA_EMULATION_HOST_CODE inline void perform_vote(void* const* operands, unsigned mask) {
  const auto lanes = reinterpret_cast<Vote* const*>(operands);
  unsigned result = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    result |= unsigned{lanes[lane]->predicate} << lane;
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)]->result = result;
}

inline unsigned ballot(unsigned mask, bool predicate, const Site& site) {
  Vote operand{predicate, 0};
  scheduler.collective(mask, &operand, perform_vote, site);
  return operand.result;
}

CUDA_EMULATION_HOST_CODE inline int lane_index() { return scheduler.current().lane; }

}  // namespace cuda_emulation

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_EMULATION_CALLER) {
  using cuda_emulation::Scheduler;
  cuda_emulation::scheduler.collective(mask, nullptr, Scheduler::warp_barrier, {"__syncwarp", file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATION_CALLER) {
  const int lane = cuda_emulation::lane_index();
  source = (lane & -width) | (source & (width - 1));
  return cuda_emulation::shuffle(mask, value, source, {"__shfl_sync", file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_CALLER) {
  const int lane = cuda_emulation::lane_index(), source = lane - static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value, source < (lane & -width) ? lane : source,
                                 {"__shfl_up_sync", file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_CALLER) {
  const int lane = cuda_emulation::lane_index(), source = lane + static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source,
                                 {"__shfl_down_sync", file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_EMULATION_CALLER) {
  const int lane = cuda_emulation::lane_index(), source = lane ^ lane_mask;
  return cuda_emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source,
                                 {"__shfl_xor_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_CALLER) {
  return cuda_emulation::ballot(mask, predicate != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATION_CALLER) {
  return cuda_emulation::ballot(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_CALLER) {
  return cuda_emulation::ballot(mask, predicate == 0, {"__all_sync", file, line}) == 0;
}
