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

// The channels of a slice, in `cols` vectors.
struct SliceChannels {
  int64_t channels, first, cols;

  int64_t left(int64_t j) const { return channels - first - j * kWidth; }  // channels from vector j on
};

// The convolution alone, with the weights packed in scratch memory.
template <class T>
static Depthwise convolution(const Tensor4& weight, const Window& window, const Tensor4& x, const Tensor4& y,
                             Scratch& scratch) {
  const auto& size = weight.size;
  Packed packed{nullptr, size[0], size[2] * size[3]};
  float* data = scratch.take(packed.floats());
  for (int64_t panel = 0; panel < packed.panels(); ++panel) pack_panel<T>(weight, packed, panel, data);
  packed.data = data;
  return {size[0], x.size[2], x.size[3], y.size[2], y.size[3], size[2],
          size[3], window,    kIdentity, packed,    {}};
}

// Stores `width` pixels of a slice, kSlice floats apart in `row`, in y, and adds them to the statistics of
// each vector of channels.
template <class T>
static void store_row(float* row, int64_t width, const SliceChannels& slice, T* y,
                      PartialStatistics* statistics) {
  for (int64_t j = 0; j < slice.cols; ++j) {
    PartialStatistics& all = statistics[j];
    vf sum{}, squares{};
    for (int64_t i = 0; i < width; ++i) {
      T* to = y + i * slice.channels + slice.first + j * kWidth;
      float* value = row + i * kSlice + j * kWidth;
      store_first(to, load(value), slice.left(j));
      if constexpr (sizeof(T) != sizeof(float)) store(value, load_first(to, slice.left(j)));
      if (all.count == 0 && i == 0) all.shift = load(value);
      sum += load(value) - all.shift;
    }
    const vf mean = sum / static_cast<float>(width);
    for (int64_t i = 0; i < width; ++i) {
      const vf e = load(row + i * kSlice + j * kWidth) - all.shift - mean;
      squares += e * e;
    }
    all.merge(width, mean, squares);
  }
}

template <class T>
static void train_depthwise(const TrainDepthwise& p, const Pool& pool) {
  Scratch scratch;
  Depthwise d = convolution<T>(p.weight, p.window, p.x.raw, p.y, scratch);
  const int64_t channels = d.channels, images = p.x.raw.size[0], slices = d.slices(),
                padded = slices * kSlice;
  float *one = scratch.take(padded), *zero = scratch.take(padded);
  for (int64_t c = 0; c < padded; ++c) one[c] = 1, zero[c] = 0;
  d.affine = {one, zero};
  float* partial = scratch.take(images * 3 * padded);  // [image][shift, mean, squares][padded]

  parallel(pool, images * slices, [&](int64_t unit) {
    const int64_t image = unit / slices, number = unit % slices;
    const SliceChannels slice{channels, number * kSlice, d.cols(number)};
    const T* x = at<const T>(p.x.raw, image);
    T* y = at<T>(p.y, image);
    Scratch own;
    float *row = own.take(d.ow * kSlice), *sums = own.take(d.strips * padded);
    PartialStatistics statistics[kVectors];
    const auto finish = [&](int64_t oy, float* from) {
      store_row(from, d.ow, slice, y + oy * d.ow * channels, statistics);
    };
    with_act(p.x.norm.act, [&](auto tag) {
      const auto fill = [&](int64_t iy, int64_t n, const Ring& ring) {
        for (int64_t j = 0; j < slice.cols; ++j) {
          const int64_t c = slice.first + j * kWidth;
          const NormVectors v(p.x.norm, channels, c);
          for (int64_t y = iy; y < iy + n; ++y)
            for (int64_t i = 0; i < d.w; ++i)
              store(ring(y) + i * kSlice + j * kWidth,
                    activate<decltype(tag)::value>(
                        load_first(x + (y * d.w + i) * channels + c, slice.left(j)) * v.scale + v.shift));
        }
      };
      depthwise_strips(d, number, 0, d.strips, sums, padded, fill, [&](int64_t) { return row; }, finish);
    });
    for (int64_t j = 0; j < slice.cols; ++j) {
      float* to = partial + image * 3 * padded + slice.first + j * kWidth;
      store(to, statistics[j].shift);
      store(to + padded, statistics[j].mean);
      store(to + 2 * padded, statistics[j].squares);
    }
  });
  if (p.statistics == nullptr) return;
  const auto count = [&](int64_t) { return d.oh * d.ow; };
  merge_statistics(partial, images, channels, padded, count, p.statistics);
}

// ---- backward --------------------------------------------------------------------------------------------

// A row of the output's gradient and the kernel row through which it sees the input row at hand.
struct SeenRow {
  const float* dy;
  int64_t ky;
};

// The taps that some columns of an input row see: tap m of kernel row ky is at weights + ky * row + m * step.
struct SeenTaps {
  const float* weights;
  int64_t row, step, count;
};

// kOut columns of the input's gradient, one vector of channels: sum over rows and taps m of
// tap(ky, m) * dy[offset + (i - m) * kSlice].
template <int kTaps, int kOut>
static inline void gather_block(const SeenRow* rows, int64_t n, int64_t offset, const SeenTaps& taps,
                                float* out, int64_t out_stride) {
  vf acc[kOut] = {};
  for (int64_t r = 0; r < n; ++r) {
    const float* w = taps.weights + rows[r].ky * taps.row;
    const float* dy = rows[r].dy + offset;
    if constexpr (kTaps > 0) {
      vf tap[kTaps];
#pragma GCC unroll 8
      for (int m = 0; m < kTaps; ++m) tap[m] = load(w + m * taps.step);
#pragma GCC unroll 16
      for (int at = 1 - kTaps; at < kOut; ++at) {
        const vf value = load(dy + at * kSlice);
#pragma GCC unroll 8
        for (int m = 0; m < kTaps; ++m)
          if (at + m >= 0 && at + m < kOut) acc[at + m] += value * tap[m];
      }
    } else {
      for (int64_t m = 0; m < taps.count; ++m)
        for (int i = 0; i < kOut; ++i) acc[i] += load(dy + (i - m) * kSlice) * load(w + m * taps.step);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOut; ++i) store(out + i * out_stride, acc[i]);
}

template <int kTaps>
static void gather(const SeenRow* rows, int64_t n, int64_t offset, int64_t columns, const SeenTaps& taps,
                   float* out, int64_t out_stride) {
  int64_t i = 0;
  const auto run = [&](auto block) {
    constexpr int kOut = decltype(block)::value;
    for (; i + kOut <= columns; i += kOut)
      gather_block<kTaps, kOut>(rows, n, offset + i * kSlice, taps, out + i * out_stride, out_stride);
  };
  run(Constant<7>());
  run(Constant<4>());
  run(Constant<1>());
}

using Gather = void (*)(const SeenRow*, int64_t, int64_t, int64_t, const SeenTaps&, float*, int64_t);

static inline Gather choose_gather(int64_t taps) {
  static constexpr Gather table[] = {gather<0>, gather<1>, gather<2>, gather<3>, gather<4>, gather<5>};
  return taps < 6 ? table[taps] : taps == 7 ? gather<7> : gather<0>;
}

// dweight[kx] += sum over x of dy[x] * a[x * stride + kx], one kernel row and one vector of channels.
template <int kKernel>
static void correlate(const float* dy, const float* a, int64_t n, int64_t stride, int64_t kw,
                      float* dweight) {
  if constexpr (kKernel > 0) {
    constexpr int kSums = kKernel < 4 ? 2 : 1;  // enough independent sums to hide the latency of an FMA
    vf acc[kSums][kKernel] = {};
    int64_t x = 0;
    for (; x + kSums <= n; x += kSums) {
#pragma GCC unroll 2
      for (int u = 0; u < kSums; ++u) {
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
      if constexpr (kSums == 2) sum += acc[1][k];
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

// Buffers for rows of one slice, kSlice floats to a pixel. In those of dy and of the activated input zeros
// lie on both sides, for taps that reach over the border.
struct BackwardRows {
  int64_t kh, margin, dy_width;
  float *dy, *a;  // the last kh rows of the output's gradient; the activated input
  float *slope, *xhat, *da;

  BackwardRows(const Depthwise& d, Scratch& scratch)
      : kh(d.kh),
        margin(d.kw),
        dy_width(margin + max64(d.ow, (d.w - 1 + d.window.left) / d.window.stride_w + 1) + 1),
        dy(zeros(kh * dy_width, scratch)),
        a(zeros(max64(d.window.left + d.w, (d.ow - 1) * d.window.stride_w + d.kw), scratch)),
        slope(scratch.take(d.w * kSlice)),
        xhat(scratch.take(d.w * kSlice)),
        da(scratch.take(d.w * kSlice)) {}

  float* dy_row(int64_t oy) const { return dy + (oy % kh * dy_width + margin) * kSlice; }

 private:
  static float* zeros(int64_t pixels, Scratch& scratch) {
    float* memory = scratch.take(pixels * kSlice);
    std::memset(memory, 0, pixels * kSlice * sizeof(float));
    return memory;
  }
};

// Row oy of the output's gradient.
template <class T>
static void load_gradient_row(const TrainDepthwiseBackward& p, const SliceChannels& slice, int64_t image,
                              int64_t oy, int64_t ow, float* row) {
  with_act(p.gradient.norm.act, [&](auto tag) {
    for (int64_t j = 0; j < slice.cols; ++j) {
      const int64_t c = slice.first + j * kWidth;
      const GradientColumn<T, decltype(tag)::value> column(p.gradient, image, c);
      const Coefficients pqr(p.coefficients, slice.channels, c);
      for (int64_t i = 0; i < ow; ++i)
        store(row + i * kSlice + j * kWidth, pqr.raw_gradient(column.at(oy * ow + i), column.v.mean));
    }
  });
}

// Row iy of the input: activated, the activation's slope, and normalised.
template <class T>
static void load_input_row(const TrainDepthwiseBackward& p, const SliceChannels& slice, int64_t image,
                           int64_t iy, int64_t w, const BackwardRows& rows) {
  const int64_t left = p.window.left;
  float *const a = rows.a, *const slope = rows.slope, *const xhat = rows.xhat;
  const T* raw = pixel_of<T>(p.x.raw, image, iy * w);
  with_act(p.x.norm.act, [&](auto tag) {
    for (int64_t j = 0; j < slice.cols; ++j) {
      const int64_t c = slice.first + j * kWidth;
      const NormVectors v(p.x.norm, slice.channels, c);
      for (int64_t i = 0; i < w; ++i) {
        const vf y = load_first(raw + i * slice.channels + c, slice.left(j));
        const Curve f = curve<decltype(tag)::value>(y * v.scale + v.shift);
        store(a + (left + i) * kSlice + j * kWidth, f.value);
        store(slope + i * kSlice + j * kWidth, f.slope);
        store(xhat + i * kSlice + j * kWidth, (y - v.mean) * v.rstd);
      }
    }
  });
}

// The gradient of the input row that n rows of dy see.
static void gather_row(const SeenRow* seen, int64_t n, const Depthwise& d, int64_t slice,
                       const BackwardRows& rows) {
  const int64_t width = d.weights.width(slice), sw = d.window.stride_w;
  for (int64_t phase = 0; phase < min64(sw, d.w); ++phase) {
    // Columns phase, phase + sw, ... see the taps kx, kx + sw, ...; the first of them sees output `column`.
    const int64_t shifted = phase + d.window.left, kx = shifted % sw, column = shifted / sw;
    SeenTaps taps{nullptr, d.kw * width, sw * width, kx < d.kw ? div_up(d.kw - kx, sw) : 0};
    const Gather gather = choose_gather(taps.count);
    for (int64_t j = 0; j < d.cols(slice); ++j) {
      taps.weights = d.weights.panel(slice) + kx * width + j * kWidth;
      gather(seen, n, column * kSlice + j * kWidth, div_up(d.w - phase, sw), taps,
             rows.da + phase * kSlice + j * kWidth, sw * kSlice);
    }
  }
}

// Stores the gradient of an input row, behind the norm if there is one; moments: [2][kSlice].
template <class T>
static void store_dx_row(const BackwardRows& rows, int64_t w, const SliceChannels& slice, bool normed, T* dx,
                         float* moments) {
  const float *const da = rows.da, *const slope = rows.slope, *const xhat = rows.xhat;
  for (int64_t j = 0; j < slice.cols; ++j) {
    vf sum{}, product{};
    for (int64_t i = 0; i < w; ++i) {
      const int64_t k = i * kSlice + j * kWidth;
      vf dz = load(da + k);
      if (normed) {
        dz = dz * load(slope + k);
        sum += dz;
        product += dz * load(xhat + k);
      }
      store_first(dx + i * slice.channels + slice.first + j * kWidth, dz, slice.left(j));
    }
    store(moments + j * kWidth, load(moments + j * kWidth) + sum);
    store(moments + kSlice + j * kWidth, load(moments + kSlice + j * kWidth) + product);
  }
}

// One image and slice. dweight: [KH * KW][kSlice], moments: [2][kSlice], both overwritten.
template <class T>
static void depthwise_backward_slice(const TrainDepthwiseBackward& p, const Depthwise& d, int64_t image,
                                     int64_t number, float* dweight, float* moments) {
  const SliceChannels slice{d.channels, number * kSlice, d.cols(number)};
  Scratch scratch;
  const BackwardRows rows(d, scratch);
  SeenRow* seen = reinterpret_cast<SeenRow*>(scratch.take(d.kh * 4));  // two 8-byte members
  std::memset(dweight, 0, d.kh * d.kw * kSlice * sizeof(float));
  std::memset(moments, 0, 2 * kSlice * sizeof(float));
  const Correlate correlate = choose_correlate(d.kw);

  const int64_t sh = d.window.stride_h, top = d.window.top;
  int64_t next = 0;  // first row of dy that is not loaded
  for (int64_t iy = 0; iy < d.h; ++iy) {
    const int64_t high = (iy + top) / sh, low = div_up(max64(0, iy + top - (d.kh - 1)), sh);
    int64_t n = 0;
    for (int64_t oy = low; oy <= high && oy < d.oh; ++oy) {
      if (oy >= next) {
        load_gradient_row<T>(p, slice, image, oy, d.ow, rows.dy_row(oy));
        next = oy + 1;
      }
      seen[n++] = {rows.dy_row(oy), iy + top - oy * sh};
    }
    if (p.x.raw.data != nullptr) load_input_row<T>(p, slice, image, iy, d.w, rows);
    if (p.dweight != nullptr) {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t j = 0; j < slice.cols; ++j)
          correlate(seen[r].dy + j * kWidth, rows.a + j * kWidth, d.ow, d.window.stride_w, d.kw,
                    dweight + seen[r].ky * d.kw * kSlice + j * kWidth);
    }
    if (p.dx.data == nullptr) continue;
    gather_row(seen, n, d, number, rows);
    store_dx_row(rows, d.w, slice, p.x.norm.vectors != nullptr, at<T>(p.dx, image) + iy * d.w * d.channels,
                 moments);
  }
}

template <class T>
static void train_depthwise_backward(const TrainDepthwiseBackward& p, const Pool& pool) {
  const Tensor4& dy = p.gradient.shape();
  const int64_t images = dy.size[0];
  Scratch scratch;
  const Tensor4& x = p.dx.data != nullptr ? p.dx : p.x.raw;
  const Depthwise d = convolution<T>(p.weight, p.window, x, dy, scratch);
  const int64_t area = d.kh * d.kw, slices = d.slices(), unit_floats = (area + 2) * kSlice;
  float* partial = scratch.take(images * slices * unit_floats);
  parallel(pool, images * slices, [&](int64_t unit) {
    float* own = partial + unit * unit_floats;
    depthwise_backward_slice<T>(p, d, unit / slices, unit % slices, own, own + area * kSlice);
  });
  // Image by image: the order of the sums depends on the shape alone.
  for (int64_t c = 0; c < d.channels; ++c) {
    const float* first = partial + c / kSlice * unit_floats + c % kSlice;
    for (int64_t k = 0; k < area + 2; ++k) {
      float total = 0;
      for (int64_t image = 0; image < images; ++image)
        total += first[image * slices * unit_floats + k * kSlice];
      if (k >= area) {
        if (p.moments != nullptr) p.moments[(k - area) * d.channels + c] = total;
      } else if (p.dweight != nullptr) {
        p.dweight[c * area + k] = total;
      }
    }
  }
}

}  // namespace EFFNET_ISA
}  // namespace effnet
