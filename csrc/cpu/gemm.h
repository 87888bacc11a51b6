// The one matrix product behind every convolution here: rows of pixels times a panel of packed weights.
//
//   c[i][:] = (sum over t, k of a[i * a_stride + t * tap_stride + k] * panel[t][k][:]) * scale + shift
//
// A "tap" is a stretch of A that is contiguous in memory: all channels of a pixel for a 1x1 convolution,
// one row of a kxk window for a dense one, one channel slice of a blocked map for a projection.
//
// Elements of a and panel are words (operands.h): fp32 values, or pairs of bf16 with their two products.
//
// A tile of kMaxRows x 2 vectors of accumulators stays in registers: per step of k, 2 loads of weights and
// 12 broadcasts feed 24 FMAs (AVX-512), so the FMA units are the limit as long as the panel, K x 32 floats,
// is in L1 or L2.
#pragma once

#include "activations.h"
#include "gemm_amx.h"
#include "operands.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kCacheLine = 16;  // words

// `ahead` is what the L2 should have next, a cache line for every second step of k: weights come from the L3
// or from memory, and a network's are larger than any cache of a core. Faster than that, the lines that are
// on their way would keep the loads of the product waiting.
template <class T, int kRows, int kCols, bool kAhead>
static void tile(const float* a, int64_t a_stride, const Taps& taps, const float* panel, const float* scale,
                 const float* shift, float* c, int64_t c_stride, const float* ahead) {
  vf acc[kRows][kCols] = {};
  for (int64_t t = 0; t < taps.count; ++t) {
    const int64_t depth = t + 1 < taps.count ? taps.k : taps.k_last;
    // Three rows to a pointer: base, base + stride and base + 2 * stride are addressing modes.
    const float* rows[(kRows + 2) / 3];
    for (int g = 0; g < (kRows + 2) / 3; ++g) rows[g] = a + t * taps.stride + g * 3 * a_stride;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, panel += kCols * kWidth) {
      if (kAhead && k % 2 == 1) __builtin_prefetch(ahead, 0, 2), ahead += kCacheLine;
      vf weights[kCols];
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) weights[j] = load(panel + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const vf value = broadcast<T>(rows[i / 3] + i % 3 * a_stride + k);
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j) acc[i][j] = multiply_add<T>(acc[i][j], value, weights[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) {
    const vf s = load(scale + j * kWidth), b = load(shift + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) store(c + i * c_stride + j * kWidth, acc[i][j] * s + b);
  }
}

template <class T, int kRows>
static void tiles_up_to(int64_t rows, int64_t cols, const float* a, int64_t a_stride, const Taps& taps,
                        const float* panel, const float* scale, const float* shift, float* c,
                        int64_t c_stride, const float* ahead) {
  if (rows == kRows) {
    const auto run = cols == 1 ? tile<T, kRows, 1, false>
                     : ahead   ? tile<T, kRows, kVectors, true>
                               : tile<T, kRows, kVectors, false>;
    return run(a, a_stride, taps, panel, scale, shift, c, c_stride, ahead);
  }
  if constexpr (kRows > 1)
    tiles_up_to<T, kRows - 1>(rows, cols, a, a_stride, taps, panel, scale, shift, c, c_stride, ahead);
}

// Rows of a tile at most, and what a thread has to set up around its tiles.
template <class T>
constexpr int64_t kTileRows = kMaxRows;
template <class T>
struct TileSetup {
  explicit TileSetup(const Taps&) {}
  void set(int64_t) {}
};
#if defined(__AMX_BF16__)
template <>
constexpr int64_t kTileRows<bf16> = kAmxRows;
template <>
struct TileSetup<bf16> : AmxShapes {
  using AmxShapes::AmxShapes;
};
#endif

// `rows` <= kTileRows<T> rows of c by `cols` <= kVectors vectors, inside for_each_tile. A tile that has
// nothing to fetch for itself fetches what is to be watched.
template <class T>
static inline void run_tile(int64_t rows, int64_t cols, const float* a, int64_t a_stride, const Taps& taps,
                            const float* panel, const float* scale, const float* shift, float* c,
                            int64_t c_stride, const float* ahead = nullptr) {
  if (ahead == nullptr && cols == kVectors)
    ahead = Watcher::ahead(taps.total() / 2 * sizeof(float) * kCacheLine);
#if defined(__AMX_BF16__)
  if constexpr (kPairs<T>) {
    const auto run = cols == 1 ? amx_tile<1> : amx_tile<kVectors>;
    return run(rows, a, a_stride, taps, panel, scale, shift, c, c_stride, ahead);
  }
#endif
  tiles_up_to<Operand<T>, kMaxRows>(rows, cols, a, a_stride, taps, panel, scale, shift, c, c_stride, ahead);
}

// Splits [0, n) into the fewest tiles of at most kTileRows<T> rows, as even as they come.
template <class T, class Body>
static inline void for_each_tile(int64_t n, TileSetup<T>& setup, const Body& body) {
  int64_t tiles = div_up(n, kTileRows<T>);
  for (int64_t begin = 0; begin < n; --tiles) {
    const int64_t rows = div_up(n - begin, tiles);
    setup.set(rows);
    body(begin, rows);
    begin += rows;
  }
}

// What tile number `tile` of a panel fetches of the next one, [k][kSlice]: the second tile begins, when the
// first has brought the panel itself.
static inline const float* ahead_of(const float* next, int64_t tile, int64_t k) {
  constexpr int64_t kTiles = 2 * kSlice / kCacheLine;
  return next == nullptr || tile < 1 || tile > kTiles ? nullptr : next + (tile - 1) * (k / 2) * kCacheLine;
}

// Weights packed for the kernels: panels of kSlice output channels (the last one of a single vector where
// that is enough), each [K][width] words, columns beyond the last channel zero.
struct Packed {
  const float* data;
  int64_t n, k;

  int64_t panels() const { return div_up(n, kSlice); }
  int64_t cols(int64_t panel) const { return min64(kVectors, div_up(n - panel * kSlice, kWidth)); }
  int64_t width(int64_t panel) const { return cols(panel) * kWidth; }
  const float* panel(int64_t p) const { return data + p * kSlice * k; }
  // A panel that is whole and worth fetching early, or null.
  const float* next(int64_t p) const { return (p + 1) * kSlice <= n && k >= 64 ? panel(p) : nullptr; }
  int64_t floats() const { return round_up(n, kWidth) * k; }
};

// kWidth x kWidth transpose in registers, log2(kWidth) rounds of pairwise exchanges at distance kApart.
template <int kApart = 1>
static inline void transpose(vf (&rows)[kWidth]) {
  vi low{}, high{};
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) {
    low[l] = (l & kApart) == 0 ? l : kWidth + l - kApart;
    high[l] = (l & kApart) == 0 ? l + kApart : kWidth + l;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kApart) continue;
    const vf a = rows[i], b = rows[i + kApart];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kApart] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * kApart < kWidth) transpose<2 * kApart>(rows);
}

// One panel of a convolution weight [O][I][KH][KW] of any strides, in the order [KH][KW][words of
// I][columns], to its place behind `data`, where `packed` will be.
template <class T>
static void pack_panel(const Tensor4& weight, const Packed& packed, int64_t p, float* data) {
  const int64_t cols = packed.cols(p), width = cols * kWidth, channels = weight.size[1];
  const int64_t in = words<T>(channels), whole = kPairs<T> ? channels / 2 : channels;
  const int64_t so = weight.stride[0], si = weight.stride[1];
  float* out = data + p * kSlice * packed.k;
  for (int64_t y = 0; y < weight.size[2]; ++y) {
    for (int64_t x = 0; x < weight.size[3]; ++x, out += in * width) {
      const T* window = static_cast<const T*>(weight.data) + y * weight.stride[2] + x * weight.stride[3];
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t first = p * kSlice + j * kWidth, valid = min64(kWidth, packed.n - first);
        const T* src = window + first * so;
        float* to = out + j * kWidth;
        int64_t i = 0;
        if (si == 1 && valid == kWidth) {
          for (; i + kWidth <= whole; i += kWidth) {
            vf block[kWidth];
#pragma GCC unroll 16
            for (int o = 0; o < kWidth; ++o) block[o] = load_words(src + o * so, i);
            transpose(block);
#pragma GCC unroll 16
            for (int d = 0; d < kWidth; ++d) store(to + (i + d) * width, block[d]);
          }
        }
        for (; i < in; ++i) {
          float lanes[kWidth] = {};
          for (int64_t o = 0; o < valid; ++o) lanes[o] = word(src + o * so, si, i, channels);
          store(to + i * width, load(lanes));
        }
      }
    }
  }
}

static inline Packed packed_as(const int64_t (&size)[4], DType type, const float* data) {
  const int64_t in = with_type(type, [&](auto of) { return words<decltype(of)>(size[1]); });
  return {data, size[0], in * size[2] * size[3]};
}

static inline Packed packed_of(const Weight& weight) {
  return packed_as(weight.size, weight.type, weight.packed);
}

[[maybe_unused]] static int64_t packed_floats(const Tensor4& weight) {
  return packed_as(weight.size, weight.type, nullptr).floats();
}

[[maybe_unused]] static void pack(const Tensor4& weight, float* data, const Pool& pool) {
  const Packed packed = packed_as(weight.size, weight.type, data);
  parallel(pool, packed.panels(), [&](int64_t panel) {
    with_type(weight.type, [&](auto of) { pack_panel<decltype(of)>(weight, packed, panel, data); });
  });
}

// What follows the affine step when a tile leaves for the output: activation, residual, rounding to T.
template <class T>
struct Store {
  T* y;               // first pixel
  const T* residual;  // may be null
  int64_t channels;   // of y and residual: the stride of a pixel
  int act;

  // c: [rows][n, in whole vectors] for pixels [pixel, pixel + rows) and channels [channel, channel + n).
  void operator()(float* c, int64_t rows, int64_t pixel, int64_t channel, int64_t n) const {
    const int64_t cols = div_up(n, kWidth);
    activate_all(act, c, rows * cols);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t offset = (pixel + i) * channels + channel;
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t left = n - j * kWidth;
        vf value = load(c + (i * cols + j) * kWidth);
        if (residual) value = value + load_first(residual + offset + j * kWidth, left);
        store_first(y + offset + j * kWidth, value, left);
      }
    }
  }
};

// `pixels` rows of A against panel p of the packed weights, leaving through `out`; `next` is the panel that
// follows in this thread, if any.
template <class T>
static inline void multiply(const float* a, int64_t a_stride, const Taps& taps, int64_t pixels,
                            const Packed& packed, const float* panel, int64_t p, const Affine& affine,
                            const Store<T>& out, int64_t first_pixel, const float* next = nullptr) {
  const int64_t channel = p * kSlice, n = min64(kSlice, packed.n - channel);
  int64_t number = 0;
  TileSetup<T> setup(taps);
  for_each_tile(pixels, setup, [&](int64_t begin, int64_t rows) {
    alignas(64) float c[kTileRows<T> * kSlice];
    run_tile<T>(rows, packed.cols(p), a + begin * a_stride, a_stride, taps, panel, affine.scale + channel,
                affine.shift + channel, c, packed.width(p), ahead_of(next, number++, packed.k));
    out(c, rows, first_pixel + begin, channel, n);
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
