// depthwise_conv_bn_act: act(bn(depthwise(x))) and the channel means of the result, one pass over x.
//
// Works on one slice of kSlice channels at a time. Input rows of the slice are brought, zero-padded, into a
// ring a little larger than the window; whoever owns them fills them in: a copy of x here, the expand GEMM in
// mbconv. So the window needs no border cases and the expanded map exists only as those few rows.
#pragma once

#include "activations.h"
#include "gemm.h"

namespace effnet {
namespace EFFNET_ISA {

struct Depthwise {
  int64_t channels, h, w, oh, ow, kh, kw;
  Window window;
  int act;
  Packed weights;  // panels of [KH * KW][width]
  Affine affine;
  // Strips of output rows: parallel work for one image where there are few slices, and the first level of
  // the channel sums. They depend on the shape alone, so the sums do not depend on the thread count.
  int64_t strips = max64(1, min64(div_up(16, slices()), oh / 8));

  int64_t slices() const { return weights.panels(); }
  int64_t cols(int64_t slice) const { return weights.cols(slice); }
  int64_t strip_begin(int64_t strip) const { return oh * strip / strips; }
  // Into how many pieces of neighbouring strips to cut the slices for this many threads. Pieces even out the
  // threads' shares, but the rows that two of them see are brought twice.
  int64_t pieces(int64_t threads) const {
    const auto cost = [&](int64_t n) {
      return div_up(slices() * n, threads) * (div_up(oh, n) * window.stride_h + kh - window.stride_h);
    };
    int64_t best = 1;
    for (int64_t n = 2; n <= strips; ++n)
      if (cost(n) < cost(best)) best = n;
    return best;
  }
};

static inline Depthwise make_depthwise(const Weight& weight, const Affine& bn, const Window& window, int act,
                                       const Tensor4& x, const Tensor4& y) {
  const auto& size = weight.size;
  return {size[0],           x.size[2], x.size[3],
          y.size[2],         y.size[3], size[2],
          size[3],           window,    act_for(x.type, act),
          packed_of(weight), bn};
}

// kOut neighbouring output pixels of one vector of channels. Every input column is loaded once and feeds all
// the outputs that see it; the weights of one window row stay in registers.
template <int kKernel, int kStride, int kOut>
static inline void window_block(const float* const* rows, int64_t offset, const float* weights, int64_t width,
                                vf scale, vf shift, float* out) {
  vf acc[kOut] = {};
  for (int y = 0; y < kKernel; ++y) {
    vf w[kKernel];
#pragma GCC unroll 8
    for (int x = 0; x < kKernel; ++x) w[x] = load(weights + (y * kKernel + x) * width);
    const float* row = rows[y] + offset;
#pragma GCC unroll 32
    for (int column = 0; column < (kOut - 1) * kStride + kKernel; ++column) {
      const vf value = load(row + column * kSlice);
#pragma GCC unroll 8
      for (int x = 0; x < kKernel; ++x) {
        const int ahead = column - x;
        if (ahead >= 0 && ahead % kStride == 0 && ahead / kStride < kOut)
          acc[ahead / kStride] += value * w[x];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOut; ++i) store(out + i * kSlice, acc[i] * scale + shift);
}

// Widths of the networks at 224 are multiples of 7; what is left goes in blocks of 4, 2 and 1.
template <int kKernel, int kStride>
static void window_row(const Depthwise& d, const float* const* rows, const float* weights, int64_t width,
                       vf scale, vf shift, float* out) {
  int64_t x = 0;
  const auto run = [&](auto block) {
    constexpr int kOut = decltype(block)::value;
    for (; x + kOut <= d.ow; x += kOut)
      window_block<kKernel, kStride, kOut>(rows, x * kStride * kSlice, weights, width, scale, shift,
                                           out + x * kSlice);
  };
  run(Constant<7>());
  run(Constant<4>());
  run(Constant<2>());
  run(Constant<1>());
}

// Any other window.
static void window_row_any(const Depthwise& d, const float* const* rows, const float* weights, int64_t width,
                           vf scale, vf shift, float* out) {
  for (int64_t i = 0; i < d.ow; ++i) {
    vf acc = {};
    for (int64_t y = 0; y < d.kh; ++y)
      for (int64_t x = 0; x < d.kw; ++x)
        acc += load(rows[y] + (i * d.window.stride_w + x) * kSlice) * load(weights + (y * d.kw + x) * width);
    store(out + i * kSlice, acc * scale + shift);
  }
}

using WindowRow = void (*)(const Depthwise&, const float* const*, const float*, int64_t, vf, vf, float*);

static inline WindowRow choose_window_row(const Depthwise& d) {
  if (d.kh != d.kw || d.window.stride_w > 2) return window_row_any;
  const bool dense = d.window.stride_w == 1;
  switch (d.kh) {
    case 3:
      return dense ? window_row<3, 1> : window_row<3, 2>;
    case 5:
      return dense ? window_row<5, 1> : window_row<5, 2>;
    case 7:
      return dense ? window_row<7, 1> : window_row<7, 2>;
    default:
      return window_row_any;
  }
}

// Input rows brought at a time: about as many pixels as fill several microkernels.
static inline int64_t rows_at_once(int64_t w) { return div_up(7 * kMr - kMr / 2, w); }

// Rows of a map slice at places of their own: pixel x of row i is at (*this)(i) + x * kSlice.
struct Ring {
  float* first;  // of row 0
  int64_t rows, stride;
  float* operator()(int64_t i) const { return first + i % rows * stride; }
};

// Strips [begin, end) of one slice. fill(iy, n, ring): the W pixels of input rows [iy, iy + n), kSlice floats
// apart, go to the places that the ring has for them. target(oy): where output row oy goes, likewise.
// finish(oy): it is there, activated. sums[strip]: kSlice channel sums of the strip's outputs.
template <class Fill, class Target, class Finish>
static void depthwise_strips(const Depthwise& d, int64_t slice, int64_t begin, int64_t end, float* sums,
                             int64_t sums_stride, const Fill& fill, const Target& target,
                             const Finish& finish) {
  const int64_t cols = d.cols(slice), step = kSlice / cols, left = d.window.left;
  const int64_t width = max64(left + d.w, (d.ow - 1) * d.window.stride_w + d.kw);
  const WindowRow window_row = choose_window_row(d);
  Scratch scratch;
  const int64_t at_once = rows_at_once(d.w), count = d.kh + at_once - 1;
  float* padded = scratch.take((count + 1) * width * kSlice);
  const Ring ring{padded + left * kSlice, count, width * kSlice};
  for (int64_t i = 0; i < count; ++i) {
    float* row = padded + i * width * kSlice;
    std::memset(row, 0, left * kSlice * sizeof(float));
    std::memset(row + (left + d.w) * kSlice, 0, (width - left - d.w) * kSlice * sizeof(float));
  }
  float* zeros = padded + count * width * kSlice;
  std::memset(zeros, 0, width * kSlice * sizeof(float));
  float* line = scratch.take(d.ow * kSlice);  // a row before its activation
  const float** rows = reinterpret_cast<const float**>(scratch.take(d.kh * 2));  // a pointer is two floats
  const float* weights = d.weights.panel(slice);
  const float *scale = d.affine.scale + slice * kSlice, *shift = d.affine.shift + slice * kSlice;

  // Input rows [.., next) are there; the last one that anybody here needs ends at `last`.
  int64_t next = 0;
  const int64_t last = min64(d.h, (d.strip_begin(end) - 1) * d.window.stride_h - d.window.top + d.kh);
  for (int64_t strip = begin; strip < end; ++strip) {
    vf strip_sum[kVectors] = {};
    for (int64_t oy = d.strip_begin(strip); oy < d.strip_begin(strip + 1); ++oy) {
      const int64_t top = oy * d.window.stride_h - d.window.top;
      for (int64_t y = 0; y < d.kh; ++y) {
        const int64_t iy = top + y;
        if (iy < 0 || iy >= d.h) {
          rows[y] = zeros;
          continue;
        }
        rows[y] = ring(iy) - left * kSlice;
        if (iy >= next) {
          next = min64(iy + at_once, last);
          fill(iy, next - iy, ring);
        }
      }
      float* out = target(oy);
      for (int64_t j = 0; j < cols; ++j) {
        if (j > 0)
          for (int64_t y = 0; y < d.kh; ++y) rows[y] += kWidth;
        window_row(d, rows, weights + j * kWidth, d.weights.width(slice), load(scale + j * kWidth),
                   load(shift + j * kWidth), line + j * kWidth);
      }
      vf sum[kTogether] = {};
      with_act<true>(d.act, [&](auto tag) {
        activate_each<decltype(tag)::value>(
            d.ow * cols, [&](int64_t i) { return load(line + i * step); },
            [&](int64_t i, int member, vf value) {
              store(out + i * step, value);
              sum[member] += value;
            });
      });
      for (int i = 0; i < kTogether; ++i) strip_sum[cols == 1 ? 0 : i % kVectors] += sum[i];
      finish(oy, out);
    }
    for (int64_t j = 0; j < cols; ++j)
      store(sums + strip * sums_stride + slice * kSlice + j * kWidth, strip_sum[j]);
  }
}

// All slices and strips of one image, and the means from their sums. make(slice, run): calls
// run(fill, target, finish) for that slice.
template <class Make>
static void depthwise_image(const Depthwise& d, const Pool& pool, float* mean, const Make& make) {
  const int64_t slices = d.slices(), strips = d.strips, padded = slices * kSlice;
  Scratch scratch;
  float* sums = scratch.take(strips * padded);
  const auto run_strips = [&](int64_t slice, int64_t begin, int64_t end) {
    make(slice, [&](const auto& fill, const auto& target, const auto& finish) {
      depthwise_strips(d, slice, begin, end, sums, padded, fill, target, finish);
    });
  };
  const int64_t pieces = d.pieces(pool.threads);
  parallel(pool, slices * pieces, [&](int64_t i) {
    const int64_t piece = i % pieces;
    run_strips(i / pieces, strips * piece / pieces, strips * (piece + 1) / pieces);
  });
  if (mean == nullptr) return;
  for (int64_t c = 0; c < d.channels; c += kWidth) {
    vf total = {};
    for (int64_t strip = 0; strip < strips; ++strip) total += load(sums + strip * padded + c);
    store_first(mean + c, total / static_cast<float>(d.oh * d.ow), d.channels - c);
  }
}

// n rows of a slice of x as fp32, kSlice floats to a pixel.
template <class T>
static inline void copy_rows(const T* x, int64_t w, int64_t channels, int64_t slice, int64_t cols, int64_t iy,
                             int64_t n, const Ring& ring) {
  const int64_t first = slice * kSlice;
  for (int64_t y = iy; y < iy + n; ++y) {
    float* row = ring(y);
    for (int64_t i = 0; i < w; ++i)
      for (int64_t j = 0; j < cols; ++j)
        store(row + i * kSlice + j * kWidth,
              load_first(x + (y * w + i) * channels + first + j * kWidth, channels - first - j * kWidth));
  }
}

template <class T>
[[maybe_unused]] static void depthwise_conv_bn_act(const DepthwiseParams& p, const Pool& pool) {
  const Depthwise d = make_depthwise(p.weight, p.bn, p.window, p.act, p.x, p.y);
  parallel_images(pool, p.x.size[0], [&](int64_t image, const Pool& inner) {
    const T* x = at<const T>(p.x, image);
    T* y = at<T>(p.y, image);
    depthwise_image(
        d, inner, p.mean ? p.mean + image * d.channels : nullptr, [&](int64_t slice, const auto& run) {
          Scratch row_scratch;
          float* row = row_scratch.take(d.ow * kSlice);
          const int64_t cols = d.cols(slice), first = slice * kSlice;
          run([&](int64_t iy, int64_t n,
                  const Ring& ring) { copy_rows(x, d.w, d.channels, slice, cols, iy, n, ring); },
              [&](int64_t) { return row; },
              [&](int64_t oy, const float* from) {
                for (int64_t i = 0; i < d.ow; ++i)
                  for (int64_t j = 0; j < cols; ++j)
                    store_first(y + (oy * d.ow + i) * d.channels + first + j * kWidth,
                                load(from + i * kSlice + j * kWidth), d.channels - first - j * kWidth);
              });
        });
  });
}

[[maybe_unused]] static void depthwise_conv_bn_act(const DepthwiseParams& p, const Pool& pool) {
  with_type(p.x.type, [&](auto of) { depthwise_conv_bn_act<decltype(of)>(p, pool); });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
