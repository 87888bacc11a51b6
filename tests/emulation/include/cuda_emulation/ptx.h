// PTX instructions as functions: asynchronous copies, tensor cores, approximations. A project that wraps its
// inline assembly in functions of these names switches to them with `using namespace cuda_emulation::ptx`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math.h"
#include "scheduler.h"
#include "warp.h"

namespace cuda_emulation {

CUDA_EMULATION_HOST_CODE inline void check_shared(const void* pointer, std::size_t bytes, const char* call) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0)
    scheduler.fail("calls %s with a shared address, %p, that is not a multiple of %zu", call, pointer, bytes);
  if (!block_memory.contains(pointer, bytes))
    scheduler.fail("calls %s with %p, which is not in shared memory", call, pointer);
}

// ---- tensor cores ---------------------------------------------------------------------------------------

struct MatrixLoad {
  const void* row;
  uint32_t* fragment;
};

CUDA_EMULATION_HOST_CODE inline void perform_ldmatrix_x4(void* const* operands, unsigned) {
  const auto lanes = reinterpret_cast<MatrixLoad* const*>(operands);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) __builtin_memcpy(elements[row], lanes[8 * matrix + row]->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      lanes[lane]->fragment[matrix] = elements[r][c] | uint32_t{elements[r][c + 1]} << 16;
    }
  }
}

// Exact, also for subnormal numbers; without branches, so that it is vectorised.
CUDA_EMULATION_HOST_CODE inline float half_bits_to_float(uint16_t half) {
  const float magnitude = bit_cast<float>((half & 0x7fffu) << 13) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(magnitude) | (half & 0x8000u) << 16;
  if (magnitude >= 0x1p16f) bits |= 0x7f800000u;  // infinity and NaN
  return bit_cast<float>(bits);
}

template <typename T>
CUDA_EMULATION_HOST_CODE float matrix_element(uint32_t bits) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) return half_bits_to_float(static_cast<uint16_t>(bits));
  return bit_cast<float>(bits << 16);
}

// Tensor cores cut off what does not fit into fp32. Infinities and NaNs stay what they are.
CUDA_EMULATION_HOST_CODE inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  if (!(std::fabs(double{nearest}) > std::fabs(x))) return nearest;
  return std::nextafter(nearest, 0.0f);
}

struct MatrixProduct {
  float* d;
  const uint32_t *a, *b;
};

// a [16, kDepth] @ b [kDepth, 8], kDepth 8 or 16.
template <typename T, int kDepth>
CUDA_EMULATION_HOST_CODE void perform_mma(void* const* operands, unsigned) {
  const auto lanes = reinterpret_cast<MatrixProduct* const*>(operands);
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixProduct& operand = *lanes[lane];
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < kDepth / 2; ++i)  // a[i / 2]: 8 rows further down, then 8 columns to the right
      a[g + i / 2 % 2 * 8][t + i % 2 + i / 4 * 8] =
          matrix_element<T>(operand.a[i / 2] >> (i % 2 * 16) & 0xffff);
    for (int i = 0; i < kDepth / 4; ++i)
      b[t + i % 2 + i / 2 * 8][g] = matrix_element<T>(operand.b[i / 2] >> (i % 2 * 16) & 0xffff);
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][t + i % 2] = operand.d[i];
  }
  // Eight products at a time, the sum of each eight cut to fp32: the least that is known of these units.
  for (int row = 0; row < 16; ++row)
    for (int first = 0; first < kDepth; first += 8) {
      double sums[8];
      for (int column = 0; column < 8; ++column) sums[column] = d[row][column];
      for (int k = first; k < first + 8; ++k)
        for (int column = 0; column < 8; ++column) sums[column] += double{a[row][k]} * double{b[k][column]};
      for (int column = 0; column < 8; ++column) d[row][column] = toward_zero(sums[column]);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

namespace ptx {

inline uint32_t shared_address(const void* pointer) {
  check_shared(pointer, 1, "__cvta_generic_to_shared");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block_memory.dynamic());
}

inline void bar_sync(int id, int threads, CUDA_EMULATION_CALLER) {
  scheduler.barrier_of(id, threads, {"bar_sync", file, line});
}

// Until a wait the data are not there, and what was there is lost.
CUDA_EMULATION_HOST_CODE inline void cp_async_16(void* shared, const void* global, int valid_bytes = 16) {
  check_shared(shared, 16, "cp.async");
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
    scheduler.fail("calls cp.async with a global address, %p, that is not a multiple of 16", global);
  if (valid_bytes < 0 || valid_bytes > 16) scheduler.fail("calls cp.async for %d bytes", valid_bytes);
  scheduler.start_copy(shared, global, valid_bytes, __builtin_return_address(0));
}

CUDA_EMULATION_HOST_CODE inline void cp_async_commit() { scheduler.commit_copies(); }

template <int kPending>
CUDA_EMULATION_HOST_CODE void cp_async_wait() {
  scheduler.wait_for_copies(kPending, __builtin_return_address(0));
}

CUDA_EMULATION_HOST_CODE inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row,
                                                 CUDA_EMULATION_CALLER) {
  check_shared(row, 16, "ldmatrix");
  accesses.access(row, 16, false, __builtin_return_address(0));
  MatrixLoad operand{row, fragment};
  scheduler.whole_warp(&operand, perform_ldmatrix_x4, {"ldmatrix_x4", file, line});
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                  CUDA_EMULATION_CALLER) {
  float sums[4] = {c[0], c[1], c[2], c[3]};
  MatrixProduct operand{sums, a, b};
  scheduler.whole_warp(&operand, perform_mma<T, 16>, {"mma_m16n8k16", file, line});
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_EMULATION_CALLER) {
  MatrixProduct operand{d, a, b};
  scheduler.whole_warp(&operand, perform_mma<T, 16>, {"mma_m16n8k16", file, line});
}

template <typename T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
                 CUDA_EMULATION_CALLER) {
  float sums[4] = {c[0], c[1], c[2], c[3]};
  MatrixProduct operand{sums, a, &b};
  scheduler.whole_warp(&operand, perform_mma<T, 8>, {"mma_m16n8k8", file, line});
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

// Within the error that the PTX manual allows.
inline float ex2_approx(float x) { return flush(approximate(std::exp2(double{flush(x)}), 0x1p-22, x)); }
inline float rcp_approx(float x) { return flush(approximate(1 / double{flush(x)}, 0x1p-23, x)); }

}  // namespace ptx
}  // namespace cuda_emulation
