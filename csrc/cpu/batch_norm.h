// BatchNorm in inference: its four vectors, of any type, folded into a scale and a shift for each channel.
#pragma once

#include <cmath>

#include "simd.h"

namespace effnet {
namespace EFFNET_ISA {

static inline float element(const Vector& v, int64_t i) {
  return with_type(v.type,
                   [&](auto of) { return to_float(static_cast<const decltype(of)*>(v.data)[i * v.stride]); });
}

// The n values from `first` on, zero beyond them; none where n <= 0.
static inline vf load_vector(const Vector& v, int64_t first, int64_t n) {
  if (n <= 0) return vf{};
  if (v.type == DType::kFloat32 && v.stride == 1)
    return load_first(static_cast<const float*>(v.data) + first, n);
  float lanes[kWidth] = {};
  for (int64_t i = 0; i < min64(n, kWidth); ++i) lanes[i] = element(v, first + i);
  return load(lanes);
}

[[maybe_unused]] static int64_t folded_floats(int64_t channels) { return 2 * round_up(channels, kSlice); }

[[maybe_unused]] static Affine fold(const BatchNorm& bn, int64_t channels, float* folded) {
  const int64_t padded = round_up(channels, kSlice);
  float *scale = folded, *shift = folded + padded;
  for (int64_t c = 0; c < padded; c += kWidth)
    store(scale + c, load_vector(bn.var, c, channels - c) + bn.eps);
  for (int64_t c = 0; c < padded; ++c) scale[c] = std::sqrt(scale[c]);
  for (int64_t c = 0; c < padded; c += kWidth) {
    const int64_t n = channels - c;
    const vf factor = n > 0 ? load_vector(bn.gamma, c, n) / load(scale + c) : vf{};
    store(scale + c, factor);
    store(shift + c, load_vector(bn.beta, c, n) - load_vector(bn.mean, c, n) * factor);
  }
  return {scale, shift};
}

}  // namespace EFFNET_ISA
}  // namespace effnet
