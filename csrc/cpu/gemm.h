// The one matrix product behind every convolution here: rows of pixels times a panel of packed weights.
//
//   c[i][:] = (sum over t, k of a[i * a_stride + t * taps.stride + k] * panel[t][k][:]) * scale + shift
//
// A "tap" is a stretch of A that is contiguous in memory: all channels of a pixel for a 1x1 convolution,
// one row of a kxk window for a dense one, one channel slice of a blocked map for a projection.
//
// Elements of a and panel are words (operands.h): fp32 values, or VNNI pairs of bf16.
//
// The microkernel has MR = kMr rows and NR = kSlice columns, two vectors. Its accumulators stay in registers:
// on AVX-512 a step of k loads 2 vectors of weights and broadcasts 12 words for 24 FMAs, so the FMA units are
// the limit as long as the panel, K x 32 floats, is in L1 or L2.
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
static void microkernel(const Product& p, const float* ahead) {
  const int64_t a_stride = p.a_stride;
  const float* panel = p.panel;
  vf acc[kRows][kCols] = {};
  for (int64_t t = 0; t < p.taps.count; ++t) {
    const int64_t depth = t + 1 < p.taps.count ? p.taps.k : p.taps.k_last;
    // Three rows to a pointer: base, base + stride and base + 2 * stride are addressing modes.
    const float* rows[(kRows + 2) / 3];
    for (int g = 0; g < (kRows + 2) / 3; ++g) rows[g] = p.a + t * p.taps.stride + g * 3 * a_stride;
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
  const auto [scale, shift] = p.affine;
  float* const c = p.c;
  const int64_t c_stride = p.c_stride;
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) {
    const vf s = load(scale + j * kWidth), b = load(shift + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) store(c + i * c_stride + j * kWidth, acc[i][j] * s + b);
  }
}

template <class T, int kRows>
static void microkernel_up_to(int64_t rows, int64_t cols, const Product& p, const float* ahead) {
  if (rows == kRows) {
    const auto run = cols == 1 ? microkernel<T, kRows, 1, false>
                     : ahead   ? microkernel<T, kRows, kVectors, true>
                               : microkernel<T, kRows, kVectors, false>;
    return run(p, ahead);
  }
  if constexpr (kRows > 1) microkernel_up_to<T, kRows - 1>(rows, cols, p, ahead);
}

// MR, and what a thread sets up around its microkernels.
template <class T>
constexpr int64_t kMrOf = kMr;
template <class T>
struct MicrokernelSetup {
  explicit MicrokernelSetup(const Taps&) {}
  void set(int64_t) {}
};
#if defined(__AMX_BF16__)
template <>
constexpr int64_t kMrOf<bf16> = kAmxRows;
template <>
struct MicrokernelSetup<bf16> : AmxTileShapes {
  using AmxTileShapes::AmxTileShapes;
};
#endif

// `rows` <= kMrOf<T> rows of c by `cols` <= kVectors vectors, inside for_each_block. A product that has
// nothing to fetch for itself fetches what is to be watched.
template <class T>
static inline void run_microkernel(int64_t rows, int64_t cols, const Product& p,
                                   const float* ahead = nullptr) {
  if (ahead == nullptr && cols == kVectors)
    ahead = Watcher::ahead(p.taps.total() / 2 * sizeof(float) * kCacheLine);
#if defined(__AMX_BF16__)
  if constexpr (kVnniPairs<T>) {
    const auto run = cols == 1 ? amx_microkernel<1> : amx_microkernel<kVectors>;
    return run(rows, p, ahead);
  }
#endif
  microkernel_up_to<Operand<T>, kMr>(rows, cols, p, ahead);
}

// Splits [0, n) into the fewest blocks of at most kMrOf<T> rows, as even as they come.
template <class T, class Body>
static inline void for_each_block(int64_t n, MicrokernelSetup<T>& setup, const Body& body) {
  int64_t blocks = div_up(n, kMrOf<T>);
  for (int64_t begin = 0; begin < n; --blocks) {
    const int64_t rows = div_up(n - begin, blocks);
    setup.set(rows);
    body(begin, rows);
    begin += rows;
  }
}

// What block number `block` fetches of the next panel, [k][kSlice]: the second block begins, when the first
// has brought the panel itself.
static inline const float* ahead_of(const float* next, int64_t block, int64_t k) {
  constexpr int64_t kBlocks = 2 * kSlice / kCacheLine;
  return next == nullptr || block < 1 || block > kBlocks ? nullptr
                                                         : next + (block - 1) * (k / 2) * kCacheLine;
}

static inline Affine from_channel(const Affine& affine, int64_t channel) {
  return {affine.scale + channel, affine.shift + channel};
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

// Lanes of a and, from kWidth on, of b, by constants.
EFFNET_INLINE vf shuffled(vf a, vf b, vi from) {
#if defined(__clang__)
  vf lanes{};
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) lanes[l] = from[l] < kWidth ? a[from[l]] : b[from[l] - kWidth];
  return lanes;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

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
    rows[i] = shuffled(a, b, low);
    rows[i + kApart] = shuffled(a, b, high);
  }
  if constexpr (2 * kApart < kWidth) transpose<2 * kApart>(rows);
}

// One panel of a convolution weight [O][I][KH][KW] of any strides, in the order [KH][KW][words of
// I][columns], to its place behind `data`, where `packed` will be.
template <class T>
static void pack_panel(const Tensor4& weight, const Packed& packed, int64_t p, float* data) {
  const int64_t cols = packed.cols(p), width = cols * kWidth, channels = weight.size[1];
  const int64_t in = words<T>(channels), whole = kVnniPairs<T> ? channels / 2 : channels;
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

// Behind a product and its affine step: activation, residual, rounding to T.
template <class T>
struct Epilogue {
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

// `count` pixels, the rows of A.
struct Pixels {
  const float* a;
  int64_t stride;
  const Taps& taps;
  int64_t count;
};

// The pixels times panel number `panel` of the packed weights. `out` takes them as those from `first_pixel`
// on; `next` is the panel that follows in this thread, if any.
template <class T>
static inline void multiply(const Pixels& pixels, const Packed& packed, int64_t panel, const Affine& affine,
                            const Epilogue<T>& out, int64_t first_pixel, const float* next = nullptr) {
  const int64_t channel = panel * kSlice, n = min64(kSlice, packed.n - channel);
  int64_t number = 0;
  MicrokernelSetup<T> setup(pixels.taps);
  for_each_block(pixels.count, setup, [&](int64_t begin, int64_t rows) {
    alignas(64) float c[kMrOf<T> * kSlice];
    run_microkernel<T>(rows, packed.cols(panel),
                       {pixels.a + begin * pixels.stride, pixels.stride, pixels.taps, packed.panel(panel),
                        from_channel(affine, channel), c, packed.width(panel)},
                       ahead_of(next, number++, packed.k));
    out(c, rows, first_pixel + begin, channel, n);
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
