// The microkernel of gemm.h on AMX: 16 rows of pixels by two vectors of output channels, VNNI pairs of bf16
// as operands.
//
// Per step of 16 words, one tile load of A and two of the panel feed two products. A tap whose length is no
// multiple of 16 ends in a step of its own with smaller tiles, so nothing beyond the operands is ever read
// and an infinity in the next pixel stays there. Registers: 0, 1 sums; 2 A, 3, 4 panel; 5 A, 6, 7 panel of
// the last step.
#pragma once

#include <initializer_list>

#include "operands.h"

#if defined(__AMX_BF16__)

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kAmxRows = 16;   // of A, and of the panel: rows of a tile register
constexpr int64_t kAmxWords = 16;  // in a row of a tile register

// What was stored at p, or anywhere but in local variables, is in memory: the compiler does not know that the
// intrinsics below read it.
EFFNET_INLINE void stores_are_done(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// The shapes of this thread's tile registers, for products over `taps`: set when first needed, changed when
// the number of rows does, released at the end, for other libraries use them too. A thread has one of these
// at a time.
class AmxTileShapes {
 public:
  // Every tap but the last is of whole steps, or all are of one length.
  explicit AmxTileShapes(const Taps& taps) : last_step_(taps.k_last % kAmxWords) {}
  ~AmxTileShapes() {
    if (rows_ > 0) _tile_release();
  }
  AmxTileShapes(const AmxTileShapes&) = delete;
  AmxTileShapes& operator=(const AmxTileShapes&) = delete;

  void set(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};  // of a row
      uint8_t rows[16] = {};
      void shape(int tile, int64_t tile_rows, int64_t words) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        bytes[tile] = static_cast<uint16_t>(words * sizeof(float));
      }
    } config;
    for (int tile : {0, 1, 2}) config.shape(tile, rows, kAmxWords);
    for (int tile : {3, 4}) config.shape(tile, kAmxRows, kAmxWords);
    if (last_step_ > 0) {
      config.shape(5, rows, last_step_);
      for (int tile : {6, 7}) config.shape(tile, last_step_, kAmxWords);
    }
    stores_are_done(&config);
    _tile_loadconfig(&config);
  }

 private:
  int64_t rows_ = 0, last_step_;
};

// As microkernel() of gemm.h. The number of rows is the one in the registers' shapes.
template <int kCols>
static void amx_microkernel(int64_t rows, const Product& p, const float* ahead) {
  constexpr int64_t kPanelBytes = kCols * kWidth * sizeof(float);
  const Taps taps = p.taps;
  const float *const a = p.a, *panel = p.panel;
  const auto [scale, shift] = p.affine;
  float* const c = p.c;
  const int64_t a_bytes = p.a_stride * sizeof(float), c_stride = p.c_stride,
                c_bytes = c_stride * sizeof(float);
  stores_are_done(a);
  _tile_zero(0);
  if constexpr (kCols == 2) _tile_zero(1);
  for (int64_t t = 0; t < taps.count; ++t) {
    const int64_t depth = t + 1 < taps.count ? taps.k : taps.k_last;
    const float* from = a + t * taps.stride;
    int64_t k = 0;
    for (; k + kAmxWords <= depth; k += kAmxWords, panel += kAmxWords * kCols * kWidth) {
      if (ahead)  // a cache line, which is also 16 words, for every second word of k, as in microkernel()
        for (int64_t line = 0; line < kAmxWords; line += 2, ahead += kAmxWords)
          __builtin_prefetch(ahead, 0, 2);
      _tile_loadd(2, from + k, a_bytes);
      _tile_loadd(3, panel, kPanelBytes);
      _tile_dpbf16ps(0, 2, 3);
      if constexpr (kCols == 2) {
        _tile_loadd(4, panel + kWidth, kPanelBytes);
        _tile_dpbf16ps(1, 2, 4);
      }
    }
    if (k == depth) continue;
    _tile_loadd(5, from + k, a_bytes);
    _tile_loadd(6, panel, kPanelBytes);
    _tile_dpbf16ps(0, 5, 6);
    if constexpr (kCols == 2) {
      _tile_loadd(7, panel + kWidth, kPanelBytes);
      _tile_dpbf16ps(1, 5, 7);
    }
    panel += (depth - k) * kCols * kWidth;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kCols == 2) _tile_stored(1, c + kWidth, c_bytes);
  for (int64_t j = 0; j < kCols; ++j) {
    const vf s = load(scale + j * kWidth), b = load(shift + j * kWidth);
    for (int64_t i = 0; i < rows; ++i) {
      float* sum = c + i * c_stride + j * kWidth;
      store(sum, load(sum) * s + b);
    }
  }
}

}  // namespace EFFNET_ISA
}  // namespace effnet

#endif
