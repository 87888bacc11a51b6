// The instructions one by one, for test_avx512.py and test_instructions.py: emulated, or as the processor has
// them.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC visibility push(default)
extern "C" {

void vfmadd(const float* a, const float* b, float* c) {
  _mm512_storeu_ps(c, _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), _mm512_loadu_ps(c)));
}

void vfmadd_down(const float* a, const float* b, float* c) {
  _mm512_storeu_ps(c, _mm512_fmadd_round_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), _mm512_loadu_ps(c),
                                            _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

void vfmsub(const float* a, const float* b, float* c) {
  _mm512_storeu_ps(c, _mm512_fmsub_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), _mm512_loadu_ps(c)));
}

void vminps(const float* a, const float* b, float* to) {
  _mm512_storeu_ps(to, _mm512_min_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
}

void vmaxps(const float* a, const float* b, float* to) {
  _mm512_storeu_ps(to, _mm512_max_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
}

void vrcp14ps(const float* from, float* to) { _mm512_storeu_ps(to, _mm512_rcp14_ps(_mm512_loadu_ps(from))); }

void vreduceps_down(const float* from, float* to) {
  _mm512_storeu_ps(to, _mm512_reduce_ps(_mm512_loadu_ps(from), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

void vscalefps(const float* a, const float* b, float* to) {
  _mm512_storeu_ps(to, _mm512_scalef_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
}

void vcvtph2ps(const uint16_t* from, float* to) {
  __m256i halves;
  std::memcpy(&halves, from, sizeof(halves));
  _mm512_storeu_ps(to, _mm512_cvtph_ps(halves));
}

void vcvtps2ph(const float* from, uint16_t* to) {
  const __m256i result =
      _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &result, sizeof(result));
}

void vpermd(const int32_t* index, const int32_t* from, int32_t* to) {
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(_mm512_loadu_si512(index), _mm512_loadu_si512(from)));
}

void vpermps(const int32_t* index, const float* from, float* to) {
  _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_loadu_ps(from)));
}

void vpmuludq(const uint64_t* a, const uint64_t* b, uint64_t* to) {
  _mm512_storeu_si512(to, _mm512_mul_epu32(_mm512_loadu_si512(a), _mm512_loadu_si512(b)));
}

void load_masked(const float* from, uint32_t mask, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from));
}

void store_masked(const float* from, uint32_t mask, float* to) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), _mm512_loadu_ps(from));
}

void vdpbf16ps(float* sum, const uint32_t* a, const uint32_t* b) {
  const __m512 result = _mm512_dpbf16_ps(_mm512_loadu_ps(sum), (__m512bh)_mm512_loadu_si512(a),
                                         (__m512bh)_mm512_loadu_si512(b));
  _mm512_storeu_ps(sum, result);
}

void vcvtneps2bf16(const float* from, uint16_t* to) {
  const __m256bh result = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
  std::memcpy(to, &result, sizeof(result));
}

#if defined(EMULATE_AMX)
// sum[rows][columns] += a[rows][depth] * b[depth][b_columns], all in 32-bit words, 16 to a row of memory.
// Everything of the result register, 16 rows of 16, comes back.
void tdpbf16ps(float* sum, const uint32_t* a, const uint32_t* b, int rows, int depth, int columns,
               int b_columns) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const int shapes[4][2] = {{rows, columns}, {rows, depth}, {depth, b_columns}, {16, 16}};
  for (int i = 0; i < 4; ++i) {
    config.rows[i] = static_cast<uint8_t>(shapes[i][0]);
    config.bytes[i] = static_cast<uint16_t>(4 * shapes[i][1]);
  }
  _tile_loadconfig(&config);
  _tile_loadd(0, sum, 64);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  _tile_dpbf16ps(0, 1, 2);
  std::memcpy(sum, bf16_emulation::tiles[0].data, sizeof(bf16_emulation::Tile::data));
  _tile_release();
}

// Must end the process.
void zero_a_released_tile() {
  _tile_release();
  _tile_zero(0);
}
#endif
}
