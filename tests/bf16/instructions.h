// AVX-512 BF16 and AMX in plain AVX-512, and where there is none that, too (avx512.h): included ahead of
// csrc/cpu, it takes the place of the intrinsics used there. Semantics are those of Intel's Software
// Developer's Manual, volume 2, operation by operation; the bits of a NaN are not promised.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
namespace avx512_emulation {

// As in avx512.h, in one instruction.
inline __m512 multiply_add(__m512 sum, __m512 a, __m512 b, uint32_t mxcsr) {
  uint32_t before;
  asm("stmxcsr %1\n\tldmxcsr %4\n\tvfmadd231ps %3, %2, %0\n\tldmxcsr %1"
      : "+v"(sum), "=m"(before)
      : "v"(a), "v"(b), "m"(mxcsr));
  return sum;
}

}  // namespace avx512_emulation
#else
#include "avx512.h"
#endif

#if defined(EMULATE_AMX)
#define EMULATE_AVX512_BF16
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#endif
#if defined(EMULATE_AVX512_BF16)
#define __AVX512BF16__ 1
#endif

namespace bf16_emulation {

// sum + a * b, rounded once and to nearest even; subnormal operands and results count as zero.
inline __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
  const uint32_t flushing = 0x9fc0;  // no exceptions, to nearest even, subnormals are zero both ways
  return avx512_emulation::multiply_add(sum, a, b, flushing);
}

inline __m512 low(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
inline __m512 high(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)); }

// VDPBF16PS: the upper products first.
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  sum = multiply_add(sum, high((__m512i)a), high((__m512i)b));
  return multiply_add(sum, low((__m512i)a), low((__m512i)b));
}

// VCVTNEPS2BF16
inline __m256bh cvtneps_pbh(__m512 values) {
  uint32_t in[16];
  uint16_t out[16];
  std::memcpy(in, &values, sizeof(in));
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent = in[i] & 0x7f800000, mantissa = in[i] & 0x007fffff, upper = in[i] >> 16;
    if (exponent == 0)
      out[i] = upper & 0x8000;
    else if (exponent == 0x7f800000)
      out[i] = mantissa == 0 ? upper : upper | 0x40;
    else
      out[i] = (in[i] + 0x7fff + (upper & 1)) >> 16;
  }
  __m256bh result;
  std::memcpy(&result, out, sizeof(out));
  return result;
}

// ---- tiles -----------------------------------------------------------------------------------------------

struct Tile {
  int rows, bytes;  // of a row; 0: not configured
  alignas(64) uint8_t data[16][64];
};

inline thread_local Tile tiles[8];

// Where the processor would raise #GP or #UD.
inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Tile& configured(int tile) {
  require(tiles[tile].rows > 0, "the tile is not configured");
  return tiles[tile];
}

inline void release() { std::memset(static_cast<void*>(tiles), 0, sizeof(tiles)); }

inline void load_config(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof(config));
  require(config[0] == 1 && config[1] == 0, "the palette must be 1, the first row 0");
  for (int i = 2; i < 16; ++i) require(config[i] == 0, "reserved bytes must be zero");
  release();
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, sizeof(bytes));
    const int rows = config[48 + i];
    require(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0), "the shape of a tile");
    require(i < 8 || rows == 0, "there are eight tiles");
    if (i < 8) tiles[i].rows = rows, tiles[i].bytes = bytes;
  }
}

inline void zero_tile(int tile) { std::memset(configured(tile).data, 0, sizeof(Tile::data)); }

inline void load_tile(int tile, const void* base, long stride) {
  Tile& t = configured(tile);
  zero_tile(tile);
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(t.data[i], static_cast<const char*>(base) + i * stride, t.bytes);
}

inline void store_tile(int tile, void* base, long stride) {
  const Tile& t = configured(tile);
  for (int i = 0; i < t.rows; ++i) std::memcpy(static_cast<char*>(base) + i * stride, t.data[i], t.bytes);
}

// TDPBF16PS: the lower and the upper products are summed apart, from zero, and then added to c.
inline void dpbf16ps_tile(int c_tile, int a_tile, int b_tile) {
  Tile &c = configured(c_tile), &a = configured(a_tile), &b = configured(b_tile);
  require(c_tile != a_tile && c_tile != b_tile && a_tile != b_tile, "three different tiles");
  require(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows && c.bytes % 4 == 0,
          "the shapes of the tiles do not match");
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int m = 0; m < c.rows; ++m) {
    __m512 lower = _mm512_setzero_ps(), upper = _mm512_setzero_ps();
    for (int k = 0; k < b.rows; ++k) {
      int32_t pair;
      std::memcpy(&pair, a.data[m] + 4 * k, sizeof(pair));
      const __m512i left = _mm512_set1_epi32(pair), right = _mm512_load_si512(b.data[k]);
      lower = multiply_add(lower, low(left), low(right));
      upper = multiply_add(upper, high(left), high(right));
    }
    const __m512 total = multiply_add(_mm512_load_ps(c.data[m]), multiply_add(lower, upper, one), one);
    _mm512_store_ps(c.data[m], _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << c.bytes / 4) - 1), total));
  }
  for (int m = c.rows; m < 16; ++m) std::memset(c.data[m], 0, sizeof(c.data[m]));
}

}  // namespace bf16_emulation

#define _mm512_dpbf16_ps bf16_emulation::dpbf16_ps
#define _mm512_cvtneps_pbh bf16_emulation::cvtneps_pbh
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig bf16_emulation::load_config
#define _tile_release bf16_emulation::release
#define _tile_loadd bf16_emulation::load_tile
#define _tile_stored bf16_emulation::store_tile
#define _tile_zero bf16_emulation::zero_tile
#define _tile_dpbf16ps bf16_emulation::dpbf16ps_tile
