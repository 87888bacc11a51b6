// The depthwise convolution in training.
//
// Forward normalises and activates its input as it is loaded, and takes the statistics of its output from
// rows that are still in cache. Backward is one pass: row by row of the input, it forms the rows of the
// output's gradient that see this row, correlates them with the flipped kernel (the input's gradient) and
// with the row itself (the weight's), and multiplies by the derivative of the input's activation on the way
// out.
#pragma once

#include "depthwise_conv_bn_act.h"
#include "train_maps.h"

namespace effnet {
namespace EFFNET_ISA {

// Rows of a slice, kSlice floats to a pixel; `cols` vectors of them hold channels.
struct SliceView {
  int64_t channels, first, cols;

  int64_t left(int64_t j) const { return channels - first - j * kWidth; }  // channels from vector j on
};

template <class T>
static void train_depthwise(const TrainDepthwise& p, const Pool& pool) {
  const auto& size = p.weight.size;
  const int64_t channels = size[0], images = p.x.raw.size[0];
  Scratch scratch;
  Packed packed{nullptr, channels, size[2] * size[3]};
  float* copy = scratch.take(packed.floats());
  for (int64_t panel = 0; panel < packed.panels(); ++panel) pack_panel<T>(p.weight, packed, panel, copy);
  packed.data = copy;
  const int64_t slices = packed.panels(), padded = slices * kSlice;
  float *one = scratch.take(padded), *zero = scratch.take(padded);
  for (int64_t c = 0; c < padded; ++c) one[c] = 1, zero[c] = 0;
  const Depthwise d{channels, p.x.raw.size[2], p.x.raw.size[3], p.y.size[2], p.y.size[3], size[2],
                    size[3],  p.window,        kIdentity,       packed,      {one, zero}};
  float* partial = scratch.take(images * 3 * padded);  // [image][shift, mean, squares][padded]

  parallel(pool, images * slices, [&](int64_t unit) {
    const int64_t image = unit / slices, slice = unit % slices;
    const SliceView view{channels, slice * kSlice, d.cols(slice)};
    const T* x = at<const T>(p.x.raw, image);
    T* y = at<T>(p.y, image);
    Scratch own;
    float *row = own.take(d.ow * kSlice), *sums = own.take(d.strips * padded);
    Moments moments[kVectors];
    const auto finish = [&](int64_t oy, float* from) {
      for (int64_t j = 0; j < view.cols; ++j) {
        vf sum{}, squares{};
        for (int64_t i = 0; i < d.ow; ++i) {
          T* to = y + (oy * d.ow + i) * channels + view.first + j * kWidth;
          float* value = from + i * kSlice + j * kWidth;
          store_first(to, load(value), view.left(j));
          if constexpr (sizeof(T) != sizeof(float)) store(value, load_first(to, view.left(j)));
          if (moments[j].count == 0 && i == 0) moments[j].shift = load(value);
          sum += load(value) - moments[j].shift;
        }
        const vf mean = sum / static_cast<float>(d.ow);
        for (int64_t i = 0; i < d.ow; ++i) {
          const vf e = load(from + i * kSlice + j * kWidth) - moments[j].shift - mean;
          squares += e * e;
        }
        moments[j].merge(d.ow, mean, squares);
      }
    };
    with_act(p.x.norm.act, [&](auto tag) {
      const auto fill = [&](int64_t iy, int64_t n, const Ring& ring) {
        for (int64_t j = 0; j < view.cols; ++j) {
          const int64_t c = view.first + j * kWidth;
          const NormVectors v(p.x.norm, channels, c);
          for (int64_t y = iy; y < iy + n; ++y)
            for (int64_t i = 0; i < d.w; ++i)
              store(ring(y) + i * kSlice + j * kWidth,
                    activate<decltype(tag)::value>(
                        load_first(x + (y * d.w + i) * channels + c, view.left(j)) * v.scale + v.shift));
        }
      };
      depthwise_strips(d, slice, 0, d.strips, sums, padded, fill, [&](int64_t) { return row; }, finish);
    });
    for (int64_t j = 0; j < view.cols; ++j) {
      float* to = partial + image * 3 * padded + view.first + j * kWidth;
      store(to, moments[j].shift);
      store(to + padded, moments[j].mean);
      store(to + 2 * padded, moments[j].squares);
    }
  });
  if (p.statistics == nullptr) return;
  const auto count = [&](int64_t) { return d.oh * d.ow; };
  merge_moments(partial, images, channels, padded, count, p.statistics);
}

// A row of the output's gradient and the kernel row through which it sees the input row at hand.
struct SeenRow {
  const float* dy;
  int64_t ky;
};

// kOut columns of the input's gradient, one vector of channels: sum over rows and taps m of
// weights[ky][kx + m * step] * dy[column + i - m].
template <int kTaps, int kOut>
static inline void gather_block(const SeenRow* rows, int64_t n, int64_t column, const float* weights,
                                int64_t row_stride, int64_t tap_stride, int64_t taps, float* out,
                                int64_t out_stride) {
  vf acc[kOut] = {};
  for (int64_t r = 0; r < n; ++r) {
    const float* w = weights + rows[r].ky * row_stride;
    const float* dy = rows[r].dy + column * kSlice;
    if constexpr (kTaps > 0) {
      vf tap[kTaps];
#pragma GCC unroll 8
      for (int m = 0; m < kTaps; ++m) tap[m] = load(w + m * tap_stride);
#pragma GCC unroll 16
      for (int at = 1 - kTaps; at < kOut; ++at) {
        const vf value = load(dy + at * kSlice);
#pragma GCC unroll 8
        for (int m = 0; m < kTaps; ++m)
          if (at + m >= 0 && at + m < kOut) acc[at + m] += value * tap[m];
      }
    } else {
      for (int64_t m = 0; m < taps; ++m)
        for (int i = 0; i < kOut; ++i) acc[i] += load(dy + (i - m) * kSlice) * load(w + m * tap_stride);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOut; ++i) store(out + i * out_stride, acc[i]);
}

template <int kTaps>
static void gather(const SeenRow* rows, int64_t n, int64_t column, int64_t count, const float* weights,
                   int64_t row_stride, int64_t tap_stride, int64_t taps, float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 7 <= count; i += 7)
    gather_block<kTaps, 7>(rows, n, column + i, weights, row_stride, tap_stride, taps, out + i * out_stride,
                           out_stride);
  for (; i + 4 <= count; i += 4)
    gather_block<kTaps, 4>(rows, n, column + i, weights, row_stride, tap_stride, taps, out + i * out_stride,
                           out_stride);
  for (; i < count; ++i)
    gather_block<kTaps, 1>(rows, n, column + i, weights, row_stride, tap_stride, taps, out + i * out_stride,
                           out_stride);
}

using Gather = void (*)(const SeenRow*, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                        float*, int64_t);

static inline Gather choose_gather(int64_t taps) {
  static constexpr Gather table[] = {gather<0>, gather<1>, gather<2>, gather<3>, gather<4>, gather<5>};
  return taps < 6 ? table[taps] : taps == 7 ? gather<7> : gather<0>;
}

// dweight[kx] += sum over x of dy[x] * a[x * stride + kx], one kernel row and one vector of channels.
template <int kKernel>
static void correlate(const float* dy, const float* a, int64_t n, int64_t stride, int64_t kw,
                      float* dweight) {
  if constexpr (kKernel > 0) {
    constexpr int kChains = kKernel < 4 ? 2 : 1;  // enough independent sums to hide the latency of an FMA
    vf acc[kChains][kKernel] = {};
    int64_t x = 0;
    for (; x + kChains <= n; x += kChains) {
#pragma GCC unroll 2
      for (int u = 0; u < kChains; ++u) {
        const vf g = load(dy + (x + u) * kSlice);
        const float* from = a + (x + u) * stride * kSlice;
#pragma GCC unroll 8
        for (int k = 0; k < kKernel; ++k) acc[u][k] += g * load(from + k * kSlice);
      }
    }
    for (; x < n; ++x)
      for (int k = 0; k < kKernel; ++k)
        acc[0][k] += load(dy + x * kSlice) * load(a + (x * stride + k) * kSlice);
    for (int k = 0; k < kKernel; ++k) {
      vf sum = acc[0][k];
      if constexpr (kChains == 2) sum += acc[1][k];
      store(dweight + k * kSlice, load(dweight + k * kSlice) + sum);
    }
  } else {
    for (int64_t k = 0; k < kw; ++k) {
      vf sum = {};
      for (int64_t x = 0; x < n; ++x) sum += load(dy + x * kSlice) * load(a + (x * stride + k) * kSlice);
      store(dweight + k * kSlice, load(dweight + k * kSlice) + sum);
    }
  }
}

using Correlate = void (*)(const float*, const float*, int64_t, int64_t, int64_t, float*);

static inline Correlate choose_correlate(int64_t kw) {
  return kw == 3 ? correlate<3> : kw == 5 ? correlate<5> : kw == 7 ? correlate<7> : correlate<0>;
}

// One image and slice. dweight: [KH * KW][kSlice], moments: [2][kSlice], both overwritten.
template <class T>
static void depthwise_backward_slice(const TrainDepthwiseBackward& p, const Packed& packed, int64_t image,
                                     int64_t slice, float* dweight, float* moments) {
  const TrainGradient& g = p.gradient;
  const auto& out = g.shape().size;
  const int64_t channels = out[1], oh = out[2], ow = out[3], kh = p.weight.size[2], kw = p.weight.size[3];
  const Tensor4& in = p.dx.data != nullptr ? p.dx : p.x.raw;
  const int64_t h = in.size[2], w = in.size[3], sh = p.window.stride_h, sw = p.window.stride_w;
  const int64_t top = p.window.top, left = p.window.left;
  const SliceView view{channels, slice * kSlice, packed.cols(slice)};
  const int64_t width = packed.width(slice);
  const bool has_x = p.x.raw.data != nullptr, normed = p.x.norm.vectors != nullptr;

  // Rows of dy with zeros on both sides, for the taps that reach over the border.
  const int64_t margin = kw, dy_width = margin + max64(ow, (w - 1 + left) / sw + 1) + 1;
  const int64_t a_width = max64(left + w, (ow - 1) * sw + kw);
  Scratch scratch;
  float* ring = scratch.take(kh * dy_width * kSlice);
  float* a = scratch.take(a_width * kSlice);
  float *slope = scratch.take(w * kSlice), *xhat = scratch.take(w * kSlice), *da = scratch.take(w * kSlice);
  SeenRow* seen = reinterpret_cast<SeenRow*>(scratch.take(kh * 4));  // two 8-byte members
  std::memset(ring, 0, kh * dy_width * kSlice * sizeof(float));
  std::memset(a, 0, a_width * kSlice * sizeof(float));
  std::memset(dweight, 0, kh * kw * kSlice * sizeof(float));
  std::memset(moments, 0, 2 * kSlice * sizeof(float));
  const Correlate correlate_row = choose_correlate(kw);

  const auto load_dy = [&](int64_t oy, float* row) {
    with_act(g.norm.act, [&](auto tag) {
      for (int64_t j = 0; j < view.cols; ++j) {
        const GradientColumn<T, decltype(tag)::value> column(g, image, view.first + j * kWidth);
        const Coefficients pqr(p.coefficients, channels, view.first + j * kWidth);
        for (int64_t i = 0; i < ow; ++i)
          store(row + i * kSlice + j * kWidth, pqr.raw_gradient(column.at(oy * ow + i), column.v.mean));
      }
    });
  };
  const auto load_a = [&](int64_t iy) {
    const T* raw = pixel_of<T>(p.x.raw, image, iy * w);
    with_act(p.x.norm.act, [&](auto tag) {
      for (int64_t j = 0; j < view.cols; ++j) {
        const int64_t c = view.first + j * kWidth;
        const NormVectors v(p.x.norm, channels, c);
        for (int64_t i = 0; i < w; ++i) {
          const vf y = load_first(raw + i * channels + c, view.left(j));
          const Curve f = curve<decltype(tag)::value>(y * v.scale + v.shift);
          store(a + (left + i) * kSlice + j * kWidth, f.value);
          store(slope + i * kSlice + j * kWidth, f.slope);
          store(xhat + i * kSlice + j * kWidth, (y - v.mean) * v.rstd);
        }
      }
    });
  };

  int64_t next = 0;  // first row of dy not yet considered
  for (int64_t iy = 0; iy < h; ++iy) {
    const int64_t high = (iy + top) / sh, low = div_up(max64(0, iy + top - (kh - 1)), sh);
    int64_t n = 0;
    for (int64_t oy = low; oy <= high && oy < oh; ++oy) {
      float* row = ring + (oy % kh * dy_width + margin) * kSlice;
      if (oy >= next) {
        load_dy(oy, row);
        next = oy + 1;
      }
      seen[n++] = {row, iy + top - oy * sh};
    }
    if (has_x) load_a(iy);
    if (p.dweight != nullptr) {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t j = 0; j < view.cols; ++j)
          correlate_row(seen[r].dy + j * kWidth, a + j * kWidth, ow, sw, kw,
                        dweight + seen[r].ky * kw * kSlice + j * kWidth);
    }
    if (p.dx.data == nullptr) continue;
    for (int64_t phase = 0; phase < min64(sw, w); ++phase) {
      // Columns phase, phase + sw, ... see the taps kx, kx + sw, ...; the first of them sees output `column`.
      const int64_t kx = (phase + left) % sw, column = (phase + left) / sw, count = div_up(w - phase, sw);
      const int64_t taps = kx < kw ? div_up(kw - kx, sw) : 0;
      const Gather gather_row = choose_gather(taps);
      for (int64_t j = 0; j < view.cols; ++j) {
        SeenRow* shifted = seen;
        if (j > 0)
          for (int64_t r = 0; r < n; ++r) shifted[r].dy += kWidth;
        gather_row(shifted, n, column, count, packed.panel(slice) + kx * width + j * kWidth, kw * width,
                   sw * width, taps, da + phase * kSlice + j * kWidth, sw * kSlice);
      }
      for (int64_t r = 0; r < n; ++r) seen[r].dy -= (view.cols - 1) * kWidth;
    }
    T* to = at<T>(p.dx, image) + iy * w * channels;
    for (int64_t j = 0; j < view.cols; ++j) {
      vf sum{}, product{};
      for (int64_t i = 0; i < w; ++i) {
        const int64_t k = i * kSlice + j * kWidth;
        vf dz = load(da + k);
        if (normed) {
          dz = dz * load(slope + k);
          sum += dz;
          product += dz * load(xhat + k);
        }
        store_first(to + i * channels + view.first + j * kWidth, dz, view.left(j));
      }
      store(moments + j * kWidth, load(moments + j * kWidth) + sum);
      store(moments + kSlice + j * kWidth, load(moments + kSlice + j * kWidth) + product);
    }
  }
}

template <class T>
static void train_depthwise_backward(const TrainDepthwiseBackward& p, const Pool& pool) {
  const int64_t images = p.gradient.shape().size[0], channels = p.weight.size[0];
  const int64_t area = p.weight.size[2] * p.weight.size[3];
  Scratch scratch;
  Packed packed{nullptr, channels, area};
  float* copy = scratch.take(packed.floats());
  for (int64_t panel = 0; panel < packed.panels(); ++panel) pack_panel<T>(p.weight, packed, panel, copy);
  packed.data = copy;
  const int64_t slices = packed.panels(), unit_floats = (area + 2) * kSlice;
  float* partial = scratch.take(images * slices * unit_floats);
  parallel(pool, images * slices, [&](int64_t unit) {
    float* own = partial + unit * unit_floats;
    depthwise_backward_slice<T>(p, packed, unit / slices, unit % slices, own, own + area * kSlice);
  });
  // Image by image: the order of the sums depends on the shape alone.
  for (int64_t c = 0; c < channels; ++c) {
    const float* first = partial + c / kSlice * unit_floats + c % kSlice;
    for (int64_t k = 0; k < area + 2; ++k) {
      float total = 0;
      for (int64_t image = 0; image < images; ++image)
        total += first[image * slices * unit_floats + k * kSlice];
      if (k >= area) {
        if (p.moments != nullptr) p.moments[(k - area) * channels + c] = total;
      } else if (p.dweight != nullptr) {
        p.dweight[c * area + k] = total;
      }
    }
  }
}

}  // namespace EFFNET_ISA
}  // namespace effnet
