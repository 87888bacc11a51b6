// Device functions of CUDA C++ that a C++ compiler lacks. Where the hardware approximates, so do these: the
// exact value is moved by a pseudo-random part of the error that CUDA's documentation allows, the same for
// the same input.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "accesses.h"
#include "random.h"

namespace cuda_emulation {

template <typename To, typename From>
CUDA_EMULATION_HOST_CODE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// exact * (1 + e) with |e| <= bound
inline float approximate(double exact, double bound, float input) {
  const auto bits = static_cast<std::int64_t>(scatter(bit_cast<std::uint32_t>(input)));
  const double result = exact * (1 + bound * (static_cast<double>(bits) * 0x1p-63));
  return static_cast<float>(result);
}

// `ftz`: subnormal numbers are zeros.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline constexpr double kUlp = 0x1p-23;  // the most that a unit in the last place is relative to the number

// CUDA C++ Programming Guide, "Intrinsic Functions", without -use_fast_math.
inline float fast_expf(float x) {
  return approximate(std::exp(double{x}), (2 + std::floor(std::fabs(1.173 * x))) * kUlp, x);
}
inline float fast_exp10f(float x) {
  return approximate(std::pow(10.0, double{x}), (2 + std::floor(std::fabs(2.97 * x))) * kUlp, x);
}
inline float fast_logf(float x) {
  if (x >= 0.5f && x <= 2)
    return static_cast<float>(std::log(double{x}) + approximate(0x1p-22, 1, x) - 0x1p-22);
  return approximate(std::log(double{x}), 3 * kUlp, x);
}
inline float fast_log2f(float x) {
  if (x >= 0.5f && x <= 2)
    return static_cast<float>(std::log2(double{x}) + approximate(0x1p-22, 1, x) - 0x1p-22);
  return approximate(std::log2(double{x}), 2 * kUlp, x);
}

}  // namespace cuda_emulation

// The C library declares functions of these names.
#define __expf(x) ::cuda_emulation::fast_expf(x)
#define __exp10f(x) ::cuda_emulation::fast_exp10f(x)
#define __logf(x) ::cuda_emulation::fast_logf(x)
#define __log2f(x) ::cuda_emulation::fast_log2f(x)

inline float __fdividef(float x, float y) {
  if (std::fabs(y) > 0x1p126f && !std::isinf(y)) return std::isinf(x) ? NAN : 0 * x;
  return cuda_emulation::approximate(double{x} / y, 2 * cuda_emulation::kUlp, y);
}
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(double{x})); }
inline float rsqrtf(float x) {
  return cuda_emulation::approximate(1 / std::sqrt(double{x}), cuda_emulation::kUlp, x);
}
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

// Rounded on their own: no fused multiply-add. `volatile` keeps the compiler from contracting.
inline float __fadd_rn(float x, float y) {
  volatile float sum = x + y;
  return sum;
}
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

inline float __int_as_float(int x) { return cuda_emulation::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulation::bit_cast<float>(x); }
inline int __float_as_int(float x) { return cuda_emulation::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_emulation::bit_cast<unsigned>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>((std::uint64_t{x} * y) >> 32);
}
inline int __mulhi(int x, int y) { return static_cast<int>((std::int64_t{x} * y) >> 32); }

// CUDA's unqualified min and max mix types as arithmetic does; of a number and a NaN they return the number.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  static_assert(std::is_arithmetic_v<T>);
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return std::min<T>(a, b);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  static_assert(std::is_arithmetic_v<T>);
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return std::max<T>(a, b);
}
