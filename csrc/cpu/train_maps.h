// Passes over whole maps in training: statistics, pooling, normalisation, and the sums and the gradient of
// BatchNorm. Each reads its maps once.
//
// A map is cut into strips of pixels of one image by its shape alone. Sums run over kBlock pixels, then over
// the strip, then over strips in order: the rounding error stays that of short sums, and the result does not
// depend on the number of threads.
#pragma once

#include "simd.h"
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
};

// One pointer for the pixel of an image, or null.
template <class T>
static inline const T* pixel_of(const Tensor4& map, int64_t image, int64_t pixel) {
  return map.data == nullptr ? nullptr : at<const T>(map, image) + pixel * map.size[1];
}

// An activation and its derivative; at the kinks the choice is torch's.
struct Curve {
  vf value, slope;
};

template <int kAct>
EFFNET_INLINE Curve curve(vf z) {
  const vf zero = {}, one = splat(1.0f);
  if constexpr (kAct == kRelu) return {activate<kRelu>(z), z <= 0.0f ? zero : one};
  if constexpr (kAct == kRelu6) {
    const vf slope = z <= 0.0f ? zero : one;
    return {activate<kRelu6>(z), z >= 6.0f ? zero : slope};
  }
  if constexpr (kAct == kSilu) {
    const vf s = sigmoid(z);
    return {z * s, s * (1.0f + z * (1.0f - s))};
  }
  if constexpr (kAct == kHardswish) {
    const vf inner = z / 3.0f + 0.5f, low = z <= -3.0f ? zero : inner;
    return {activate<kHardswish>(z), z >= 3.0f ? one : low};
  }
  return {z, one};
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

static inline vf load_or(const float* p, int64_t n, float otherwise) {
  return p == nullptr ? splat(otherwise) : load_first(p, n);
}

// Sums of kSums terms per channel over every strip: [strip][kSums][padded].
// term(image, pixel, c, n, sum): adds the terms of one vector of channels of one pixel to sum[0..kSums).
template <int kSums, class Term>
static void strip_sums(const Strips& s, float* sums, const Pool& pool, const Term& term) {
  const int64_t padded = s.padded();
  parallel(pool, s.count(), [&](int64_t strip) {
    Scratch scratch;
    float* block = scratch.take(kSums * padded);
    float* total = sums + strip * kSums * padded;
    std::memset(total, 0, kSums * padded * sizeof(float));
    for (int64_t first = s.begin(strip); first < s.end(strip); first += kBlock) {
      const int64_t last = min64(s.end(strip), first + kBlock);
      std::memset(block, 0, kSums * padded * sizeof(float));
      for (int64_t pixel = first; pixel < last; ++pixel) {
        for (int64_t c = 0; c < s.channels; c += kWidth) {
          vf sum[kSums];
          for (int k = 0; k < kSums; ++k) sum[k] = load(block + k * padded + c);
          term(s.image(strip), pixel, c, s.channels - c, sum);
          for (int k = 0; k < kSums; ++k) store(block + k * padded + c, sum[k]);
        }
      }
      for (int64_t i = 0; i < kSums * padded; i += kWidth)
        store(total + i, load(total + i) + load(block + i));
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
struct Moments {
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

// [2][C] mean and biased variance from the moments of `parts` parts, [part][shift, mean, squares][padded], in
// double: the shifts differ. count(part): how many values.
template <class Count>
static void merge_moments(const float* moments, int64_t parts, int64_t channels, int64_t padded,
                          const Count& count, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, squares = 0, total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const float* m = moments + part * 3 * padded + c;
      const double n = static_cast<double>(count(part)), share = n / (total + n);
      const double delta = static_cast<double>(m[0]) + static_cast<double>(m[padded]) - mean;
      mean += delta * share;
      squares += m[2 * padded] + delta * delta * total * share;
      total += n;
    }
    out[c] = static_cast<float>(mean);
    out[channels + c] = static_cast<float>(squares / total);
  }
}

template <class T>
static void train_statistics(const Tensor4& y, float* out, const Pool& pool) {
  const Strips s(y);
  const int64_t padded = s.padded();
  Scratch scratch;
  float* partial = scratch.take(s.count() * 3 * padded);
  parallel(pool, s.count(), [&](int64_t strip) {
    Scratch own;
    float* block = own.take(2 * padded);
    float *shift = partial + strip * 3 * padded, *mean = shift + padded, *squares = mean + padded;
    const int64_t begin = s.begin(strip), end = s.end(strip);
    const T* rows = pixel_of<T>(y, s.image(strip), begin);
    std::memset(mean, 0, 2 * padded * sizeof(float));
    for (int64_t c = 0; c < s.channels; c += kWidth) store(shift + c, load_first(rows + c, s.channels - c));
    for (int64_t done = 0; done < end - begin; done += kBlock, rows += kBlock * s.channels) {
      const int64_t n = min64(end - begin - done, kBlock);
      const auto value = [&](int64_t i, int64_t c) {
        return load_first(rows + i * s.channels + c, s.channels - c) - load(shift + c);
      };
      std::memset(block, 0, 2 * padded * sizeof(float));
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < s.channels; c += kWidth) store(block + c, load(block + c) + value(i, c));
      for (int64_t c = 0; c < padded; c += kWidth) store(block + c, load(block + c) / static_cast<float>(n));
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < s.channels; c += kWidth) {
          const vf d = value(i, c) - load(block + c);
          store(block + padded + c, load(block + padded + c) + d * d);
        }
      }
      for (int64_t c = 0; c < padded; c += kWidth) {
        Moments m{done, {}, load(mean + c), load(squares + c)};
        m.merge(n, load(block + c), load(block + padded + c));
        store(mean + c, m.mean);
        store(squares + c, m.squares);
      }
    }
  });
  const auto count = [&](int64_t strip) { return s.end(strip) - s.begin(strip); };
  merge_moments(partial, s.count(), s.channels, padded, count, out);
}

template <class T>
static void train_pool(const TrainSource& x, float* out, const Pool& pool) {
  const Strips s(x.raw);
  Scratch scratch;
  float* sums = scratch.take(s.count() * s.padded());
  with_act(x.norm.act, [&](auto tag) {
    strip_sums<1>(s, sums, pool, [&](int64_t image, int64_t pixel, int64_t c, int64_t n, vf* sum) {
      const NormVectors v(x.norm, s.channels, c);
      const vf y = load_first(pixel_of<T>(x.raw, image, pixel) + c, n);
      sum[0] += activate<decltype(tag)::value>(y * v.scale + v.shift);
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
      const float* gate = x.gate == nullptr ? nullptr : x.gate + image * s.channels;
      for (int64_t pixel = s.begin(strip); pixel < s.end(strip); ++pixel) {
        const T* from = pixel_of<T>(x.raw, image, pixel);
        const T* add = pixel_of<T>(shortcut, image, pixel);
        T* to = at<T>(out, image) + pixel * s.channels;
        for (int64_t c = 0; c < s.channels; c += kWidth) {
          const int64_t n = s.channels - c;
          const NormVectors v(x.norm, s.channels, c);
          vf y = activate<decltype(tag)::value>(load_first(from + c, n) * v.scale + v.shift);
          if (gate != nullptr) y = y * load_first(gate + c, n);
          if (add != nullptr) y = y + load_first(add + c, n);
          store_first(to + c, y, n);
        }
      }
    });
  });
}

// dz at one vector of channels of one pixel, and the raw value there (zero where it is not kept).
template <class T, int kAct>
struct Behind {
  vf dz, y;

  EFFNET_INLINE Behind of(const T* grad, const T* raw, const NormVectors& v, vf gate, vf bias, int64_t n) {
    const vf y = raw == nullptr ? vf{} : load_first(raw, n);
    vf dz = bias;
    if (grad != nullptr) dz = load_first(grad, n) * gate + bias;
    if constexpr (kAct != kIdentity) dz = dz * curve<kAct>(y * v.scale + v.shift).slope;
    return {dz, y};
  }
};

template <class T>
static void train_moments(const TrainGradient& g, float* out, const Pool& pool) {
  const Strips s(g.shape());
  Scratch scratch;
  float* sums = scratch.take(s.count() * 2 * s.padded());
  with_act(g.norm.act, [&](auto tag) {
    strip_sums<2>(s, sums, pool, [&](int64_t image, int64_t pixel, int64_t c, int64_t n, vf* sum) {
      const T *grad = pixel_of<T>(g.grad, image, pixel), *raw = pixel_of<T>(g.raw, image, pixel);
      const NormVectors v(g.norm, s.channels, c);
      const int64_t offset = image * s.channels + c;
      const auto b =
          Behind<T, decltype(tag)::value>::of(grad ? grad + c : nullptr, raw ? raw + c : nullptr, v,
                                              load_or(g.gate ? g.gate + offset : nullptr, n, 1),
                                              load_or(g.bias ? g.bias + offset : nullptr, n, 0), n);
      sum[0] += b.dz;
      sum[1] += b.dz * ((b.y - v.mean) * v.rstd);
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
    strip_sums<5>(s, sums, pool, [&](int64_t image, int64_t pixel, int64_t c, int64_t n, vf* sum) {
      const NormVectors v(x.norm, s.channels, c);
      const vf y = load_first(pixel_of<T>(x.raw, image, pixel) + c, n);
      const vf g = load_first(pixel_of<T>(grad, image, pixel) + c, n);
      const Curve f = curve<decltype(tag)::value>(y * v.scale + v.shift);
      const vf xhat = (y - v.mean) * v.rstd, slope = f.slope;
      sum[0] += g * f.value;
      sum[1] += g * slope;
      sum[2] += slope;
      sum[3] += g * slope * xhat;
      sum[4] += slope * xhat;
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
      for (int64_t pixel = s.begin(strip); pixel < s.end(strip); ++pixel) {
        const T *grad = pixel_of<T>(g.grad, image, pixel), *raw = pixel_of<T>(g.raw, image, pixel);
        T* to = at<T>(out, image) + pixel * s.channels;
        for (int64_t c = 0; c < s.channels; c += kWidth) {
          const int64_t n = s.channels - c, offset = image * s.channels + c;
          const NormVectors v(g.norm, s.channels, c);
          const auto b =
              Behind<T, decltype(tag)::value>::of(grad ? grad + c : nullptr, raw ? raw + c : nullptr, v,
                                                  load_or(g.gate ? g.gate + offset : nullptr, n, 1),
                                                  load_or(g.bias ? g.bias + offset : nullptr, n, 0), n);
          const vf p = load_first(coefficients + c, n), q = load_first(coefficients + s.channels + c, n),
                   r = load_first(coefficients + 2 * s.channels + c, n);
          store_first(to + c, p * b.dz + (q * (b.y - v.mean) + r), n);
        }
      }
    });
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
