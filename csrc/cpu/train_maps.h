// Passes over whole maps in training: statistics, pooling, normalisation, and the sums and the gradient of
// BatchNorm. Each reads its maps once.
//
// A map is cut into strips of pixels of one image by its shape alone. Sums run over a block of pixels, then
// over the strip, then over strips in order: the rounding error stays that of short sums, and the result does
// not depend on the number of threads.
#pragma once

#include <cmath>

#include "activations.h"
#include "batch_norm.h"
#include "parallel.h"
#include "train.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kBlock = 64;

struct Strips {
  int64_t images, pixels, channels;

  explicit Strips(const Tensor4& map)
      : images(map.size[0]), pixels(map.size[2] * map.size[3]), channels(map.size[1]) {}
  int64_t padded() const { return round_up(channels, kWidth); }
  int64_t per_image() const { return div_up(pixels, max64(kBlock, (1 << 16) / channels)); }
  int64_t count() const { return images * per_image(); }
  int64_t image(int64_t strip) const { return strip / per_image(); }
  int64_t begin(int64_t strip) const { return pixels * (strip % per_image()) / per_image(); }
  int64_t end(int64_t strip) const { return pixels * (strip % per_image() + 1) / per_image(); }
  // Pixels that are worked through channel by channel: about 16 KB of each map, which L1 keeps.
  int64_t block() const { return max64(8, min64(kBlock, (1 << 12) / channels)); }
};

// One pointer for the pixel of an image, or null.
template <class T>
static inline const T* pixel_of(const Tensor4& map, int64_t image, int64_t pixel) {
  return map.data == nullptr ? nullptr : at<const T>(map, image) + pixel * map.size[1];
}

// The per-channel constants of a norm at one vector of channels; zero beyond the last.
struct NormVectors {
  vf scale = splat(1.0f), shift{}, mean{}, rstd{};

  NormVectors(const TrainNorm& norm, int64_t channels, int64_t c) {
    if (norm.vectors == nullptr) return;
    const float* v = norm.vectors + c;
    const int64_t n = channels - c;
    scale = load_first(v, n);
    shift = load_first(v + channels, n);
    mean = load_first(v + 2 * channels, n);
    rstd = load_first(v + 3 * channels, n);
  }
};

static inline vf load_or(const float* p, int64_t offset, int64_t n, float otherwise) {
  return p == nullptr ? splat(otherwise) : load_first(p + offset, n);
}

// Sums of kSums terms per channel over every strip: [strip][kSums][padded].
// columns(image, c, n): the constants of one vector of channels, as a function (pixel, sum) that adds the
// terms of one pixel to sum[0..kSums). Pixels are the inner loop, so constants and sums stay in registers.
template <int kSums, class Columns>
static void strip_sums(const Strips& s, float* sums, const Pool& pool, const Columns& columns) {
  const int64_t padded = s.padded();
  parallel(pool, s.count(), [&](int64_t strip) {
    float* total = sums + strip * kSums * padded;
    std::memset(total, 0, kSums * padded * sizeof(float));
    for (int64_t first = s.begin(strip); first < s.end(strip); first += s.block()) {
      const int64_t last = min64(s.end(strip), first + s.block());
      for (int64_t c = 0; c < s.channels; c += kWidth) {
        const auto add_terms = columns(s.image(strip), c, s.channels - c);
        vf sum[kSums] = {};
        for (int64_t pixel = first; pixel < last; ++pixel) add_terms(pixel, sum);
#pragma GCC unroll 8
        for (int k = 0; k < kSums; ++k) store(total + k * padded + c, load(total + k * padded + c) + sum[k]);
      }
    }
  });
}

// Adds the strips [begin, end) in order: out[k * stride + c] = factor * sum.
template <int kSums>
static void add_strips(const Strips& s, const float* sums, int64_t begin, int64_t end, float factor,
                       float* out, int64_t stride) {
  const int64_t padded = s.padded();
  for (int k = 0; k < kSums; ++k) {
    for (int64_t c = 0; c < s.channels; c += kWidth) {
      vf total = {};
      for (int64_t strip = begin; strip < end; ++strip)
        total += load(sums + (strip * kSums + k) * padded + c);
      store_first(out + k * stride + c, total * factor, s.channels - c);
    }
  }
}

// Mean, relative to `shift`, and sum of squared deviations of `count` values, merged with those of others by
// the formula of Chan, Golub and LeVeque (Algorithms for computing the sample variance, 1983). The shift is
// one of the values: where they lie close together and far from zero, the differences are exact and the mean
// is not.
struct PartialStatistics {
  int64_t count = 0;
  vf shift{}, mean{}, squares{};

  void merge(int64_t n, vf other_mean, vf other_squares) {
    const float share = static_cast<float>(n) / static_cast<float>(count + n);
    const vf delta = other_mean - mean;
    mean += delta * share;
    squares += other_squares + delta * delta * (static_cast<float>(count) * share);
    count += n;
  }
};

// [2][C] mean and biased variance from those of `parts` parts, [part][shift, mean, squares][padded], in
// double: the shifts differ. count(part): how many values.
template <class Count>
static void merge_statistics(const float* partial, int64_t parts, int64_t channels, int64_t padded,
                             const Count& count, float* out) {
  Scratch scratch;
  auto* mean = reinterpret_cast<double*>(scratch.take(4 * padded));
  double* squares = mean + padded;
  std::memset(mean, 0, 2 * padded * sizeof(double));
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const float* m = partial + part * 3 * padded;
    const double n = static_cast<double>(count(part)), share = n / (total + n), weight = total * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = static_cast<double>(m[c]) + static_cast<double>(m[padded + c]) - mean[c];
      mean[c] += delta * share;
      squares[c] += m[2 * padded + c] + delta * delta * weight;
    }
    total += n;
  }
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = static_cast<float>(mean[c]);
    out[channels + c] = static_cast<float>(squares[c] / total);
  }
}

template <class T>
static void train_statistics(const Tensor4& y, float* out, const Pool& pool) {
  const Strips s(y);
  const int64_t padded = s.padded();
  Scratch scratch;
  float* partial = scratch.take(s.count() * 3 * padded);
  parallel(pool, s.count(), [&](int64_t strip) {
    float *shift = partial + strip * 3 * padded, *mean = shift + padded, *squares = mean + padded;
    const int64_t begin = s.begin(strip), end = s.end(strip);
    const T* rows = pixel_of<T>(y, s.image(strip), begin);
    std::memset(mean, 0, 2 * padded * sizeof(float));
    for (int64_t c = 0; c < s.channels; c += kWidth) store(shift + c, load_first(rows + c, s.channels - c));
    for (int64_t done = 0; done < end - begin; done += kBlock, rows += kBlock * s.channels) {
      const int64_t n = min64(end - begin - done, kBlock);
      for (int64_t c = 0; c < s.channels; c += kWidth) {
        const vf first = load(shift + c);
        const auto value = [&](int64_t i) {
          return load_first(rows + i * s.channels + c, s.channels - c) - first;
        };
        vf sum = {}, deviations = {};
        for (int64_t i = 0; i < n; ++i) sum += value(i);
        sum = sum / static_cast<float>(n);
        for (int64_t i = 0; i < n; ++i) deviations += (value(i) - sum) * (value(i) - sum);
        PartialStatistics part{done, {}, load(mean + c), load(squares + c)};
        part.merge(n, sum, deviations);
        store(mean + c, part.mean);
        store(squares + c, part.squares);
      }
    }
  });
  const auto count = [&](int64_t strip) { return s.end(strip) - s.begin(strip); };
  merge_statistics(partial, s.count(), s.channels, padded, count, out);
}

// [4][C] scale, shift, mean, rstd from [2][C] mean and variance.
static void train_norm(const float* statistics, const BatchNorm& bn, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    const float mean = statistics[c], rstd = 1.0f / std::sqrt(statistics[channels + c] + bn.eps);
    const float scale = element(bn.gamma, c) * rstd;
    out[c] = scale;
    out[channels + c] = element(bn.beta, c) - mean * scale;
    out[2 * channels + c] = mean;
    out[3 * channels + c] = rstd;
  }
}

// [3][C] p, q, r from a norm and [2][C] sum dz and sum dz * xhat over `count` values.
static void train_coefficients(const float* vectors, const float* moments, int64_t channels, int64_t count,
                               float* out) {
  const float *scale = vectors, *rstd = vectors + 3 * channels;
  const float factor = -1.0f / static_cast<float>(count);
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = scale[c];
    out[channels + c] = scale[c] * factor * moments[channels + c] * rstd[c];
    out[2 * channels + c] = scale[c] * factor * moments[c];
  }
}

template <class T>
static void train_pool(const TrainSource& x, float* out, const Pool& pool) {
  const Strips s(x.raw);
  Scratch scratch;
  float* sums = scratch.take(s.count() * s.padded());
  with_act(x.norm.act, [&](auto tag) {
    strip_sums<1>(s, sums, pool, [&](int64_t image, int64_t c, int64_t n) {
      return [v = NormVectors(x.norm, s.channels, c), y = pixel_of<T>(x.raw, image, 0) + c, n, &s](
                 int64_t pixel, vf* sum) {
        const vf z = load_first(y + pixel * s.channels, n) * v.scale + v.shift;
        sum[0] += activate<decltype(tag)::value>(z);
      };
    });
  });
  for (int64_t image = 0; image < s.images; ++image)
    add_strips<1>(s, sums, image * s.per_image(), (image + 1) * s.per_image(),
                  1.0f / static_cast<float>(s.pixels), out + image * s.channels, 0);
}

template <class T>
static void train_apply(const TrainSource& x, const void* residual, const Tensor4& out, const Pool& pool) {
  const Strips s(x.raw);
  Tensor4 shortcut = out;
  shortcut.data = const_cast<void*>(residual);
  with_act(x.norm.act, [&](auto tag) {
    parallel(pool, s.count(), [&](int64_t strip) {
      const int64_t image = s.image(strip);
      for (int64_t first = s.begin(strip); first < s.end(strip); first += s.block()) {
        const int64_t last = min64(s.end(strip), first + s.block());
        for (int64_t c = 0; c < s.channels; c += kWidth) {
          const int64_t n = s.channels - c;
          const NormVectors v(x.norm, s.channels, c);
          const vf gate = load_or(x.gate, image * s.channels + c, n, 1);
          for (int64_t pixel = first; pixel < last; ++pixel) {
            const vf z = load_first(pixel_of<T>(x.raw, image, pixel) + c, n) * v.scale + v.shift;
            vf y = activate<decltype(tag)::value>(z) * gate;
            if (residual != nullptr) y = y + load_first(pixel_of<T>(shortcut, image, pixel) + c, n);
            store_first(at<T>(out, image) + pixel * s.channels + c, y, n);
          }
        }
      }
    });
  });
}

// dz and the raw value, zero where it is not kept.
struct Behind {
  vf dz, y;
};

// The gradient behind the norm along the pixels of an image, at one vector of channels.
template <class T, int kAct>
struct GradientColumn {
  const T *grad, *raw;
  int64_t channels, n;
  NormVectors v;
  vf gate, bias;

  GradientColumn(const TrainGradient& g, int64_t image, int64_t c)
      : grad(pixel_of<T>(g.grad, image, 0)),
        raw(pixel_of<T>(g.raw, image, 0)),
        channels(g.shape().size[1]),
        n(channels - c),
        v(g.norm, channels, c),
        gate(load_or(g.gate, image * channels + c, n, 1)),
        bias(load_or(g.bias, image * channels + c, n, 0)) {
    if (grad != nullptr) grad += c;
    if (raw != nullptr) raw += c;
  }

  Behind at(int64_t pixel) const {
    const vf y = raw == nullptr ? vf{} : load_first(raw + pixel * channels, n);
    vf dz = bias;
    if (grad != nullptr) dz = load_first(grad + pixel * channels, n) * gate + bias;
    if constexpr (kAct != kIdentity) dz = dz * curve<kAct>(y * v.scale + v.shift).slope;
    return {dz, y};
  }
};

// p, q and r at one vector of channels.
struct Coefficients {
  vf p, q, r;

  Coefficients(const float* pqr, int64_t channels, int64_t c)
      : p(load_first(pqr + c, channels - c)),
        q(load_first(pqr + channels + c, channels - c)),
        r(load_first(pqr + 2 * channels + c, channels - c)) {}

  vf raw_gradient(const Behind& b, vf mean) const { return p * b.dz + (q * (b.y - mean) + r); }
};

template <class T>
static void train_moments(const TrainGradient& g, float* out, const Pool& pool) {
  const Strips s(g.shape());
  Scratch scratch;
  float* sums = scratch.take(s.count() * 2 * s.padded());
  with_act(g.norm.act, [&](auto tag) {
    strip_sums<2>(s, sums, pool, [&](int64_t image, int64_t c, int64_t) {
      return [column = GradientColumn<T, decltype(tag)::value>(g, image, c)](int64_t pixel, vf* sum) {
        const Behind b = column.at(pixel);
        sum[0] += b.dz;
        sum[1] += b.dz * ((b.y - column.v.mean) * column.v.rstd);
      };
    });
  });
  add_strips<2>(s, sums, 0, s.count(), 1.0f, out, s.channels);
}

template <class T>
static void train_gate_moments(const Tensor4& grad, const TrainSource& x, float* out, const Pool& pool) {
  const Strips s(x.raw);
  Scratch scratch;
  float* sums = scratch.take(s.count() * 5 * s.padded());
  with_act(x.norm.act, [&](auto tag) {
    strip_sums<5>(s, sums, pool, [&](int64_t image, int64_t c, int64_t n) {
      return [v = NormVectors(x.norm, s.channels, c), raw = pixel_of<T>(x.raw, image, 0) + c,
              from = pixel_of<T>(grad, image, 0) + c, n, &s](int64_t pixel, vf* sum) {
        const vf y = load_first(raw + pixel * s.channels, n), g = load_first(from + pixel * s.channels, n);
        const Curve f = curve<decltype(tag)::value>(y * v.scale + v.shift);
        const vf xhat = (y - v.mean) * v.rstd, through = g * f.slope;
        sum[0] += g * f.value;
        sum[1] += through;
        sum[2] += f.slope;
        sum[3] += through * xhat;
        sum[4] += f.slope * xhat;
      };
    });
  });
  for (int64_t image = 0; image < s.images; ++image)
    add_strips<5>(s, sums, image * s.per_image(), (image + 1) * s.per_image(), 1.0f, out + image * s.channels,
                  s.images * s.channels);
}

template <class T>
static void train_raw_gradient(const TrainGradient& g, const float* coefficients, const Tensor4& out,
                               const Pool& pool) {
  const Strips s(g.shape());
  with_act(g.norm.act, [&](auto tag) {
    parallel(pool, s.count(), [&](int64_t strip) {
      const int64_t image = s.image(strip);
      for (int64_t first = s.begin(strip); first < s.end(strip); first += s.block()) {
        const int64_t last = min64(s.end(strip), first + s.block());
        for (int64_t c = 0; c < s.channels; c += kWidth) {
          const GradientColumn<T, decltype(tag)::value> column(g, image, c);
          const Coefficients pqr(coefficients, s.channels, c);
          for (int64_t pixel = first; pixel < last; ++pixel)
            store_first(at<T>(out, image) + pixel * s.channels + c,
                        pqr.raw_gradient(column.at(pixel), column.v.mean), column.n);
        }
      }
    });
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
