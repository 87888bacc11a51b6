// AVX-512 in AVX2, FMA and F16C, for a processor that has no more: what csrc/cpu, instructions.h and
// test_avx512.py use of it, which holds it against exact arithmetic. The rest of a build for AVX-512 is in
// vectors of 64 bytes, which GCC makes of two of 32 by itself.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

// Not before: the compiler's own headers have to see what there is.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1

namespace avx512_emulation {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Pairs __attribute__((vector_size(64)));

union Floats {
  __m512 whole;
  __m256 half[2];
};

template <class Operation, class... Operands>
inline __m512 by_halves(const Operation& operation, const Operands&... operands) {
  Floats result;
  for (int i : {0, 1}) result.half[i] = operation(Floats{operands}.half[i]...);
  return result.whole;
}

// ---- memory ----------------------------------------------------------------------------------------------

template <class Vector>
inline Vector load(const void* p) {
  Vector result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

template <class Vector>
inline void store(void* p, Vector v) {
  std::memcpy(p, &v, sizeof(v));
}

// Lanes outside of the mask are not touched: they may be where no memory is.
inline __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  __m512 result{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1)
      std::memcpy(reinterpret_cast<char*>(&result) + 4 * i, static_cast<const char*>(p) + 4 * i, 4);
  return result;
}

inline void mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1)
      std::memcpy(static_cast<char*>(p) + 4 * i, reinterpret_cast<const char*>(&v) + 4 * i, 4);
}

// ---- numbers ---------------------------------------------------------------------------------------------

// sum + a * b, rounded once, under another MXCSR. One statement, for the compiler would move arithmetic
// across a change of it.
inline __m512 multiply_add(__m512 sum, __m512 a, __m512 b, uint32_t mxcsr) {
  Floats result{sum};
  const Floats left{a}, right{b};
  uint32_t before;
  asm("stmxcsr %2\n\tldmxcsr %7\n\tvfmadd231ps %5, %3, %0\n\tvfmadd231ps %6, %4, %1\n\tldmxcsr %2"
      : "+&x"(result.half[0]), "+&x"(result.half[1]), "=m"(before)
      : "x"(left.half[0]), "x"(left.half[1]), "x"(right.half[0]), "x"(right.half[1]), "m"(mxcsr));
  return result.whole;
}

// Rounded as _MM_FROUND_TO_... says, without exceptions; subnormal numbers as MXCSR has it.
inline __m512 fmadd_round_ps(__m512 a, __m512 b, __m512 c, int rounding) {
  const uint32_t subnormal = _mm_getcsr() & 0x8040;
  return multiply_add(c, a, b, subnormal | 0x1f80 | (rounding & 3) << 13);
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}

inline __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmsub_ps(x, y, z); }, a, b, c);
}

inline __m512 min_ps(__m512 a, __m512 b) {
  return by_halves([](__m256 x, __m256 y) { return _mm256_min_ps(x, y); }, a, b);
}

inline __m512 max_ps(__m512 a, __m512 b) {
  return by_halves([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}

// The upper 14 bits of the quotient, rounded toward zero: as far from it as the manual allows, 2^-14 of it. A
// subnormal quotient, for which the manual promises less, is the nearest one.
inline __m512 rcp14_ps(__m512 a) {
  const __m512 quotient = 1.0f / a;
  const Words bits = (Words)quotient;
  return (__m512)((bits & 0x7f800000u) == 0 ? bits : bits & ~0x1ffu);
}

// What rounding down leaves, in [0, 1); of infinities 0.
template <int kRounding>
inline __m512 reduce_ps(__m512 a) {
  static_assert(kRounding == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  for (int i = 0; i < 16; ++i) a[i] = std::isinf(a[i]) ? 0.0f : a[i] - std::floor(a[i]);
  return a;
}

// a * 2^floor(b), rounded once.
inline __m512 scalef_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) {
    const float limited = b[i] < -1000 ? -1000 : b[i] > 1000 ? 1000 : b[i];
    a[i] = b[i] != b[i] ? b[i] : std::ldexp(a[i], static_cast<int>(std::floor(limited)));
  }
  return a;
}

inline __m512 cvtph_ps(__m256i a) {
  const __m128i half[2] = {_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)};
  Floats result;
  for (int i : {0, 1}) result.half[i] = _mm256_cvtph_ps(half[i]);
  return result.whole;
}

template <int kRounding>
inline __m256i cvtps_ph(__m512 a) {
  const Floats from{a};
  return _mm256_set_m128i(_mm256_cvtps_ph(from.half[1], kRounding), _mm256_cvtps_ph(from.half[0], kRounding));
}

// ---- words -----------------------------------------------------------------------------------------------

inline __m512 set1_ps(float value) { return value - __m512{}; }
inline __m512 setzero_ps() { return __m512{}; }
inline __m512i set1_epi32(int32_t value) { return (__m512i)(value - Ints{}); }
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i slli_epi32(__m512i a, unsigned bits) { return (__m512i)((Words)a << bits); }  // bits < 32

// Products of the lower halves of the words.
inline __m512i mul_epu32(__m512i a, __m512i b) {
  return (__m512i)(((Pairs)a & 0xffffffffu) * ((Pairs)b & 0xffffffffu));
}

// By the last four bits of the indices.
inline __m512i permutexvar_epi32(__m512i index, __m512i a) {
  return (__m512i)__builtin_shuffle((Ints)a, (Ints)index);
}
inline __m512 permutexvar_ps(__m512i index, __m512 a) { return __builtin_shuffle(a, (Ints)index); }

inline __m512 maskz_mov_ps(__mmask16 mask, __m512 a) { return maskz_loadu_ps(mask, &a); }

}  // namespace avx512_emulation

#undef _mm512_cvtps_ph
#undef _mm512_fmadd_round_ps
#undef _mm512_reduce_ps
#define _mm512_and_si512 avx512_emulation::and_si512
#define _mm512_cvtph_ps avx512_emulation::cvtph_ps
#define _mm512_cvtps_ph(values, rounding) avx512_emulation::cvtps_ph<(rounding)>(values)
#define _mm512_fmadd_ps avx512_emulation::fmadd_ps
#define _mm512_fmadd_round_ps avx512_emulation::fmadd_round_ps
#define _mm512_fmsub_ps avx512_emulation::fmsub_ps
#define _mm512_load_ps avx512_emulation::load<__m512>
#define _mm512_load_si512 avx512_emulation::load<__m512i>
#define _mm512_loadu_ps avx512_emulation::load<__m512>
#define _mm512_loadu_si512 avx512_emulation::load<__m512i>
#define _mm512_mask_storeu_ps avx512_emulation::mask_storeu_ps
#define _mm512_maskz_loadu_ps avx512_emulation::maskz_loadu_ps
#define _mm512_maskz_mov_ps avx512_emulation::maskz_mov_ps
#define _mm512_max_ps avx512_emulation::max_ps
#define _mm512_min_ps avx512_emulation::min_ps
#define _mm512_mul_epu32 avx512_emulation::mul_epu32
#define _mm512_permutexvar_epi32 avx512_emulation::permutexvar_epi32
#define _mm512_permutexvar_ps avx512_emulation::permutexvar_ps
#define _mm512_rcp14_ps avx512_emulation::rcp14_ps
#define _mm512_reduce_ps(values, rounding) avx512_emulation::reduce_ps<(rounding)>(values)
#define _mm512_scalef_ps avx512_emulation::scalef_ps
#define _mm512_set1_epi32 avx512_emulation::set1_epi32
#define _mm512_set1_ps avx512_emulation::set1_ps
#define _mm512_setzero_ps avx512_emulation::setzero_ps
#define _mm512_slli_epi32 avx512_emulation::slli_epi32
#define _mm512_store_ps avx512_emulation::store<__m512>
#define _mm512_storeu_ps avx512_emulation::store<__m512>
#define _mm512_storeu_si512 avx512_emulation::store<__m512i>
