// squeeze_excite_gate: gate(W_expand @ act(W_reduce @ mean + b_reduce) + b_expand), fp32 throughout.
// squeeze_excite: the same behind a pool over the map, and the scale in front of it. The map is read
// twice, the second time from cache where an image fits one.
#pragma once

#include "activations.h"
#include "gemm.h"

namespace effnet {
namespace EFFNET_ISA {

template <class T>
static inline float dot(const T* w, const float* x, int64_t n) {
  vf total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int u = 0; u < 4; ++u) total[u] += load(w + i + u * kWidth) * load(x + i + u * kWidth);
  for (; i < n; i += kWidth) total[0] += load_first(w + i, n - i) * load_first(x + i, n - i);
  return sum_lanes((total[0] + total[1]) + (total[2] + total[3]));
}

static inline float element(const Matrix& m, int64_t i) {
  return with_type(m.type, [&](auto of) { return to_float(static_cast<const decltype(of)*>(m.data)[i]); });
}

// out = act(W @ x + b), W: [outputs][inputs].
static inline void fully_connected(const Matrix& w, const Matrix& b, int64_t outputs, int64_t inputs,
                                   const float* x, int act, float* out, const Pool& pool) {
  constexpr int64_t kChunk = 16;
  const Pool alone;
  // A parallel region costs about as much as 16k multiply-adds.
  parallel(outputs * inputs < (1 << 14) ? alone : pool, div_up(outputs, kChunk), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, n = min64(kChunk, outputs - begin);
    alignas(64) float row[kChunk] = {};
    with_type(w.type, [&](auto of) {
      const auto* rows = static_cast<const decltype(of)*>(w.data) + begin * inputs;
      for (int64_t o = 0; o < n; ++o) row[o] = element(b, begin + o) + dot(rows + o * inputs, x, inputs);
    });
    activate_all(act, row, kChunk / kWidth);
    std::memcpy(out + begin, row, n * sizeof(float));
  });
}

// gate[0..C) from mean[0..C) of one image.
static inline void gate_of_image(const SqueezeExciteWeights& se, const float* mean, float* gate,
                                 const Pool& pool) {
  Scratch scratch;
  float* hidden = scratch.take(se.reduced);
  fully_connected(se.w_reduce, se.b_reduce, se.reduced, se.channels, mean, se.act, hidden, pool);
  fully_connected(se.w_expand, se.b_expand, se.channels, se.reduced, hidden, se.gate, gate, pool);
}

static void squeeze_excite_gate(const GateParams& p, const Pool& pool) {
  const int64_t channels = p.se.channels;
  parallel_images(pool, p.n, [&](int64_t image, const Pool& inner) {
    gate_of_image(p.se, p.mean + image * channels, p.gate + image * channels, inner);
  });
}

// Channel sums over pixels come in two levels, blocks of this many pixels first: the rounding error of a
// sum grows with the length of the longer level, and the order is the same for every thread count.
constexpr int64_t kSumBlock = 128;

template <class T>
static void squeeze_excite_image(const SqueezeExciteParams& p, int64_t image, const Pool& pool) {
  const int64_t channels = p.x.size[1], pixels = p.x.size[2] * p.x.size[3];
  const int64_t blocks = div_up(pixels, kSumBlock), padded = round_up(channels, kWidth);
  const T* x = at<const T>(p.x, image);
  T* y = at<T>(p.y, image);
  Scratch scratch;
  float* sums = scratch.take(blocks * padded);
  float* mean = scratch.take(padded);
  float* gate = scratch.take(padded);
  parallel(pool, blocks, [&](int64_t block) {
    const int64_t end = min64(pixels, (block + 1) * kSumBlock);
    for (int64_t c = 0; c < channels; c += kWidth) {
      vf total = {};
      for (int64_t i = block * kSumBlock; i < end; ++i)
        total += load_first(x + i * channels + c, channels - c);
      store(sums + block * padded + c, total);
    }
  });
  for (int64_t c = 0; c < padded; c += kWidth) {
    vf total = {};
    for (int64_t block = 0; block < blocks; ++block) total += load(sums + block * padded + c);
    store(mean + c, total / static_cast<float>(pixels));
  }
  gate_of_image(p.se, mean, gate, pool);
  parallel(pool, blocks, [&](int64_t block) {
    const int64_t end = min64(pixels, (block + 1) * kSumBlock);
    for (int64_t i = block * kSumBlock; i < end; ++i)
      for (int64_t c = 0; c < channels; c += kWidth)
        store_first(y + i * channels + c, load_first(x + i * channels + c, channels - c) * load(gate + c),
                    channels - c);
  });
}

static void squeeze_excite(const SqueezeExciteParams& p, const Pool& pool) {
  parallel_images(pool, p.x.size[0], [&](int64_t image, const Pool& inner) {
    with_type(p.x.type, [&](auto of) { squeeze_excite_image<decltype(of)>(p, image, inner); });
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
