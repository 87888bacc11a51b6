// fused_mbconv: act(bn(conv(x))), then an optional 1x1 projection with its bn, then the residual.
//
// Works on strips of output rows. The input rows of a strip are copied once, zero-padded and in fp32, from
// any layout (so an NCHW image costs no extra pass); a window row is then one contiguous stretch of KW * C_in
// floats, a "tap" of the GEMM; 3x3 windows at stride 1 have fewer products (winograd.h). The expanded strip
// stays in cache between the two products.
#pragma once

#include "activations.h"
#include "winograd.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kStripFloats = 1 << 14;  // expanded strip: 64 KiB, a small share of L2

struct FusedMBConv {
  Packed expand, project;
  Winograd winograd;
  const Usual* usual;  // for each image, where the 3x3 windows go by Winograd's algorithm; or null
};

// Rows [first, first + n) of the padded input, `width` pixels each, as words [n][width][words of C].
template <class T>
static void copy_window_rows(const Tensor4& x, int64_t image, int64_t first, int64_t n, int64_t left,
                             int64_t width, float* out) {
  using Out = Operand<T>;
  const int64_t channels = x.size[1], pixel = places<T>(channels), h = x.size[2], w = x.size[3];
  auto* to = reinterpret_cast<Out*>(out);
  for (int64_t r = 0; r < n; ++r, to += width * pixel) {
    const int64_t y = first + r;
    if (y < 0 || y >= h) {
      std::memset(static_cast<void*>(to), 0, width * pixel * sizeof(Out));
      continue;
    }
    const T* row = at<const T>(x, image) + y * x.stride[2];
    const int64_t copied = min64(w, width - left);
    Out *inside = to + left * pixel, *end = inside + copied * pixel;
    std::memset(static_cast<void*>(to), 0, left * pixel * sizeof(Out));
    std::memset(static_cast<void*>(end), 0, (width - left - copied) * pixel * sizeof(Out));
    if (x.stride[1] == 1 && x.stride[3] == channels && pixel == channels) {
      if constexpr (std::is_same_v<T, Out>) {
        std::memcpy(static_cast<void*>(inside), row, copied * channels * sizeof(Out));
      } else {
        for (int64_t i = 0; i < copied * channels; i += kWidth)
          store_first(inside + i, load_first(row + i, copied * channels - i), copied * channels - i);
      }
      continue;
    }
    if (pixel > channels) std::memset(static_cast<void*>(inside), 0, copied * pixel * sizeof(Out));
    for (int64_t c = 0; c < channels; ++c) {
      const T* line = row + c * x.stride[1];
      Out* column = inside + place<T>(c, channels);
      for (int64_t i = 0; i < copied; ++i) {
        if constexpr (kVnniPairs<T>)
          column[i * pixel] = line[i * x.stride[3]];
        else
          column[i * pixel] = to_float(line[i * x.stride[3]]);
      }
    }
  }
}

template <class T>
static void fused_mbconv_strip(const FusedMBConvParams& p, const FusedMBConv& f, int64_t image, int64_t oy,
                               int64_t rows) {
  const int64_t in = words<T>(p.x.size[1]), ow = p.y.size[3], kh = p.weight.size[2], kw = p.weight.size[3];
  const int64_t sh = p.window.stride_h, sw = p.window.stride_w, mid_channels = f.expand.n;
  const int64_t slices = f.expand.panels(), pixels = rows * ow;
  // Of outputs, with those that fill the last tiles up.
  const bool by_winograd = f.usual != nullptr;
  const int64_t whole_rows = by_winograd ? round_up(rows, 2) : rows,
                whole_ow = by_winograd ? round_up(ow, 2) : ow;
  const int64_t width = max64((whole_ow - 1) * sw + kw, p.window.left), row_words = width * in;
  const int64_t window_rows = (whole_rows - 1) * sh + kh;
  Scratch scratch;
  float* window = scratch.take(window_rows * row_words);
  copy_window_rows<T>(p.x, image, oy * sh - p.window.top, window_rows, p.window.left, width, window);

  const Taps taps{kh, row_words, kw * in, kw * in};
  const bool project = p.project.packed != nullptr;
  float* mid = project ? scratch.take(slices * pixels * kSlice) : nullptr;  // [slice][pixel][kSlice]
  T* y = at<T>(p.y, image);
  const T* residual = p.residual ? at<const T>(p.x, image) : nullptr;
  const int64_t first_pixel = oy * ow;
  const int act = act_for(p.x.type, p.act);
  const Epilogue<T> conv_epilogue{y, residual, mid_channels, act};

  WinogradStrip strip{window, width, in, rows, ow, whole_rows / 2, whole_ow / 2, nullptr, nullptr};
  float* line = nullptr;  // sums of the strip without a projection
  if (by_winograd) {
    strip.operands = scratch.take(kPoints * strip.tiles() * in);
    strip.products = scratch.take(kPoints * strip.tiles() * kSlice);
    if (!project) line = scratch.take(pixels * kSlice);
    strip.mark(f.usual[image], oy - p.window.top, p.x.size[2], scratch);
    strip.transform();
  }

  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t cols = f.expand.cols(slice), channel = slice * kSlice,
                  n = min64(kSlice, mid_channels - channel);
    float* const of_slice = project ? mid + slice * pixels * kSlice : line;
    if (by_winograd) {
      const int64_t step = project ? kSlice : cols * kWidth;
      strip.convolve(f.expand, f.winograd.weights, slice, p.bn, step,
                     [&](int64_t r) { return of_slice + r * ow * step; });
      if (!project) {
        conv_epilogue(line, pixels, first_pixel, channel, n);
        continue;
      }
    } else {
      MicrokernelSetup<T> setup(taps);
      for (int64_t r = 0; r < rows; ++r) {
        const float* a = window + r * sh * row_words;
        if (!project) {
          multiply({a, sw * in, taps, ow}, f.expand, slice, p.bn, conv_epilogue, first_pixel + r * ow);
          continue;
        }
        float* to = of_slice + r * ow * kSlice;
        for_each_block(ow, setup, [&](int64_t begin, int64_t count) {
          run_microkernel<T>(count, cols,
                             {a + begin * sw * in, sw * in, taps, f.expand.panel(slice),
                              from_channel(p.bn, channel), to + begin * kSlice, kSlice});
        });
      }
      if (!project) continue;
    }
    activate_all(act, of_slice, pixels * cols, kSlice / cols);
    if constexpr (kVnniPairs<T>) to_operand<T>(of_slice, pixels, n, nullptr);
  }
  if (!project) return;
  const Taps mid_taps{slices, pixels * kSlice, words<T>(kSlice),
                      words<T>(mid_channels - (slices - 1) * kSlice)};
  const Epilogue<T> epilogue{y, residual, f.project.n, kIdentity};
  for (int64_t panel = 0; panel < f.project.panels(); ++panel)
    multiply({mid, kSlice, mid_taps, pixels}, f.project, panel, p.project_bn, epilogue, first_pixel);
}

static void fused_mbconv(const FusedMBConvParams& p, const Pool& pool) {
  FusedMBConv f{packed_of(p.weight), packed_of(p.project), {}, nullptr};
  const int64_t oh = p.y.size[2], ow = p.y.size[3];
  Scratch scratch;
  // As many strips as fit the cache, and a whole number for each thread; of whole tiles, whatever the
  // threads.
  int64_t unit = 1, fit = div_up(oh * ow * round_up(f.expand.n, kSlice), kStripFloats);
  if (p.winograd != nullptr && p.x.size[2] * p.x.size[3] >= kWinogradPixels) {
    f.winograd = winograd_as(p.weight.size, p.winograd);
    if (f.winograd.usable()) {
      f.usual = with_type(p.x.type, [&](auto of) { return measure<decltype(of)>(p.x, pool, scratch); });
      unit = 2;
      fit = div_up(div_up(oh, 2) * div_up(ow, 2), kWinogradTiles);
    }
  }
  const int64_t units = div_up(oh, unit), strips = min64(units, round_up(fit, pool.threads));
  parallel(pool, p.x.size[0] * strips, [&](int64_t i) {
    const int64_t image = i / strips, strip = i % strips, oy = units * strip / strips * unit;
    const int64_t rows = min64(oh, units * (strip + 1) / strips * unit) - oy;
    with_type(p.x.type, [&](auto of) { fused_mbconv_strip<decltype(of)>(p, f, image, oy, rows); });
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
