// Vectors of one instruction set, in GCC's vector extensions: the same source serves AVX-512, AVX2 and
// plain C++. Everything is static inline in a namespace of its own, so that no function compiled for a
// wide instruction set can be picked by the linker to serve a narrow one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common.h"

// For what must not become a call inside a loop over vectors.
#define EFFNET_INLINE static inline __attribute__((always_inline))

namespace effnet {
namespace EFFNET_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;    // floats in a vector
constexpr int kMr = 12;       // MR of the GEMM microkernel: 12 x 2 accumulators of 32 registers
constexpr int kTogether = 4;  // vectors that are activated together
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kMr = 6;  // 6 x 2 of 16 registers
constexpr int kTogether = 4;
#else
constexpr int kWidth = 4;
constexpr int kMr = 6;
constexpr int kTogether = 2;
#endif
constexpr int kVectors = 2;                // vectors in a channel slice
constexpr int kSlice = kVectors * kWidth;  // channels in a slice, and NR of the microkernel
static_assert(kTogether % kVectors == 0, "a member of a group is always of the same column");

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef float vf_unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

static inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

EFFNET_INLINE vf splat(float value) { return value - vf{}; }
EFFNET_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
EFFNET_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }

// 16-bit numbers as float32, and float32 as 16-bit numbers: to nearest even, NaN stays NaN.

EFFNET_INLINE vf widen_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

EFFNET_INLINE vh narrow_bf16(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh(v);  // subnormals become zero
#else
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40u, vh);
#endif
}

EFFNET_INLINE vf widen_fp16(vh h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  const vu bits = __builtin_convertvector(h, vu), sign = (bits & 0x8000u) << 16;
  const vi magnitude = (vi)((bits & 0x7fffu) << 13);  // exponent and fraction in their places
  const vi rebiased = magnitude + ((127 - 15) << 23), least = vi{} + (113 << 23);  // least: 2^-14, as bits
  // Infinity and NaN have the highest exponent there is; a subnormal is what its fraction adds to 2^-14.
  const vi special = rebiased + ((128 - 16) << 23);
  const vi subnormal = (vi)((vf)(magnitude + least) - (vf)least);
  const vi widened = magnitude < (1 << 23) ? subnormal : magnitude >= (31 << 23) ? special : rebiased;
  return (vf)((vu)widened | sign);
#endif
}

EFFNET_INLINE vh narrow_fp16(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu sign = (vu)v & 0x80000000u;
  const vi magnitude = (vi)((vu)v ^ sign), half = vi{} + (126 << 23);  // half: 0.5, as bits
  // What rounds up to 65536 or beyond has the bits of infinity. Next to 0.5 a float32 has the last place of a
  // subnormal float16, so that adding it rounds.
  const vi normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const vi subnormal = (vi)((vf)magnitude + (vf)half) - half;
  const vi large = magnitude > (255 << 23) ? vi{} + 0x7e00 : vi{} + 0x7c00;
  const vi narrowed = magnitude < (113 << 23) ? subnormal : magnitude >= (143 << 23) ? large : normal;
  return __builtin_convertvector((vu)narrowed | sign >> 16, vh);
#endif
}

EFFNET_INLINE vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return widen_bf16(h);
}

EFFNET_INLINE vf load(const fp16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return widen_fp16(h);
}

EFFNET_INLINE void store(bf16* p, vf v) {
  const vh h = narrow_bf16(v);
  std::memcpy(static_cast<void*>(p), &h, sizeof(h));
}

EFFNET_INLINE void store(fp16* p, vf v) {
  const vh h = narrow_fp16(v);
  std::memcpy(static_cast<void*>(p), &h, sizeof(h));
}

#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)  // which does not see masked accesses
#define EFFNET_MASKED
#endif

// The first n <= kWidth lanes; the rest of a loaded vector is zero, of a stored one untouched.
template <class T>
EFFNET_INLINE vf load_first(const T* p, int64_t n) {
  if (n >= kWidth) return load(p);
#if defined(EFFNET_MASKED)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#endif
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
EFFNET_INLINE void store_first(T* p, vf v, int64_t n) {
  if (n >= kWidth) return store(p, v);
#if defined(EFFNET_MASKED)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
#endif
  T lanes[kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

static inline float sum_lanes(vf v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

static inline bool any(vi lanes) {
  int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= lanes[i];
  return all != 0;
}

// x limited to [low, high]; NaN stays NaN (the second operand of min and max wins there).
EFFNET_INLINE vf clamp(vf x, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(splat(high), _mm512_max_ps(splat(low), x));
#elif defined(__AVX2__)
  return _mm256_min_ps(splat(high), _mm256_max_ps(splat(low), x));
#else
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
#endif
}

// A loop over few vectors, unrolled, which stay in registers. (A lambda for each step may become a call.)
#define EFFNET_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); ++i)

// A number as a type, for lambdas compiled once per value.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class T>
static inline T* at(const Tensor4& t, int64_t n) {
  return static_cast<T*>(t.data) + n * t.stride[0];
}

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float widened;
  std::memcpy(&widened, &bits, sizeof(widened));
  return widened;
}
static inline float to_float(fp16 value) { return widen_fp16(vh{value.bits})[0]; }

}  // namespace EFFNET_ISA
}  // namespace effnet
