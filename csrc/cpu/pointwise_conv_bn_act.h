// pointwise_conv_bn_act: act(bn((x * gate) @ W)) + residual, optionally averaged over the map.
// Reads x once per block of pixels and writes y once.
#pragma once

#include "activations.h"
#include "gemm.h"

namespace effnet {
namespace EFFNET_ISA {

// A block of pixels as rows of words that the microkernel can read: x itself where nothing needs doing, else
// a copy with the gate multiplied in.
template <class T>
static inline const float* rows_of(const T* x, int64_t pixels, int64_t channels, const float* gate,
                                   Scratch& scratch) {
  if constexpr (std::is_same_v<T, Operand<T>>) {
    if (gate == nullptr && places<T>(channels) == channels) return reinterpret_cast<const float*>(x);
  }
  float* rows = scratch.take(pixels * words<T>(channels));
  for (int64_t i = 0; i < pixels; ++i) {
    auto* row = reinterpret_cast<Operand<T>*>(rows + i * words<T>(channels));
    for (int64_t c = 0; c < channels; c += kWidth) {
      vf value = load_first(x + i * channels + c, channels - c);
      if (gate) value = value * load_first(gate + c, channels - c);
      store_first(row + c, value, channels - c);
    }
    close_pair<T>(row, channels);
  }
  return rows;
}

constexpr int64_t kPixelBlock = 8 * kMr;

template <class T>
static void pointwise_image(const PointwiseParams& p, const Packed& packed, int64_t image, const Pool& pool) {
  const int64_t in = p.x.size[1], out = packed.n, pixels = p.x.size[2] * p.x.size[3];
  const int64_t k = words<T>(in);
  const Taps taps{1, 0, k, k};
  const T* x = at<const T>(p.x, image);
  const Epilogue<T> epilogue{at<T>(p.y, image), p.residual.data ? at<const T>(p.residual, image) : nullptr,
                             out, act_for(p.x.type, p.act)};
  const int64_t blocks = div_up(pixels, kPixelBlock);
  parallel(pool, blocks, [&](int64_t block) {
    const int64_t first = pixels * block / blocks, n = pixels * (block + 1) / blocks - first;
    Scratch scratch;
    const float* a = rows_of(x + first * in, n, in, p.gate ? p.gate + image * in : nullptr, scratch);
    for (int64_t panel = 0; panel < packed.panels(); ++panel)
      multiply({a, k, taps, n}, packed, panel, p.bn, epilogue, first);
  });
}

// The head: the map is averaged block by block and never written.
template <class T>
static void pointwise_pool_image(const PointwiseParams& p, const Packed& packed, int64_t image,
                                 const Pool& pool) {
  const int64_t in = p.x.size[1], out = packed.n, pixels = p.x.size[2] * p.x.size[3];
  const int64_t k = words<T>(in);
  const Taps taps{1, 0, k, k};
  Scratch scratch;
  const float* a =
      rows_of(at<const T>(p.x, image), pixels, in, p.gate ? p.gate + image * in : nullptr, scratch);
  const T* residual = p.residual.data ? at<const T>(p.residual, image) : nullptr;
  parallel(pool, packed.panels(), [&](int64_t panel) {
    const int64_t channel = panel * kSlice, n = min64(kSlice, out - channel), cols = packed.cols(panel);
    vf total[kVectors] = {};
    MicrokernelSetup<T> setup(taps);
    for_each_block(pixels, setup, [&](int64_t begin, int64_t rows) {
      alignas(64) float c[kMrOf<T> * kSlice];
      run_microkernel<T>(
          rows, cols,
          {a + begin * k, k, taps, packed.panel(panel), from_channel(p.bn, channel), c, cols * kWidth});
      activate_all(act_for(p.x.type, p.act), c, rows * cols);
      for (int64_t j = 0; j < cols; ++j) {
        vf sum = {};
        for (int64_t i = 0; i < rows; ++i) {
          sum += load(c + (i * cols + j) * kWidth);
          if (residual)
            sum += load_first(residual + (begin + i) * out + channel + j * kWidth, n - j * kWidth);
        }
        total[j] += sum;
      }
    });
    for (int64_t j = 0; j < cols; ++j)
      store_first(at<T>(p.y, image) + channel + j * kWidth, total[j] / static_cast<float>(pixels),
                  n - j * kWidth);
  });
}

template <class T>
static void pointwise_conv_bn_act(const PointwiseParams& p, const Pool& pool) {
  const Packed packed = packed_of(p.weight);
  parallel_images(pool, p.x.size[0], [&](int64_t image, const Pool& inner) {
    p.pool ? pointwise_pool_image<T>(p, packed, image, inner) : pointwise_image<T>(p, packed, image, inner);
  });
}

static void pointwise_conv_bn_act(const PointwiseParams& p, const Pool& pool) {
  with_type(p.x.type, [&](auto of) { pointwise_conv_bn_act<decltype(of)>(p, pool); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
