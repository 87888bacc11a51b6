// fused_mbconv: act(bn(conv(x))), then an optional 1x1 projection with its bn, then the residual.
//
// Works on strips of output rows. The input rows of a strip are copied once, zero-padded and in fp32, from
// any layout (so an NCHW image costs no extra pass); a window row is then one contiguous stretch of KW * C_in
// floats, a "tap" of the GEMM. The expanded strip stays in cache between the two products.
#pragma once

#include "gemm.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kStripFloats = 1 << 14;  // expanded strip: 64 KiB, a small share of L2

struct FusedMBConv {
  Packed expand, project;
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
      for (int64_t i = 0; i < copied * channels; i += kWidth)
        store_first(inside + i, load_first(row + i, copied * channels - i), copied * channels - i);
      continue;
    }
    if (pixel > channels) std::memset(static_cast<void*>(inside), 0, copied * pixel * sizeof(Out));
    for (int64_t c = 0; c < channels; ++c) {
      const T* line = row + c * x.stride[1];
      Out* column = inside + place<T>(c, channels);
      for (int64_t i = 0; i < copied; ++i) {
        if constexpr (kPairs<T>)
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
  const int64_t width = max64((ow - 1) * sw + kw, p.window.left), row_words = width * in;
  Scratch scratch;
  float* window = scratch.take(((rows - 1) * sh + kh) * row_words);
  copy_window_rows<T>(p.x, image, oy * sh - p.window.top, (rows - 1) * sh + kh, p.window.left, width, window);

  const Taps taps{kh, row_words, kw * in, kw * in};
  const bool project = p.project.packed != nullptr;
  float* mid = project ? scratch.take(slices * pixels * kSlice) : nullptr;  // [slice][pixel][kSlice]
  T* y = at<T>(p.y, image);
  const T* residual = p.residual ? at<const T>(p.x, image) : nullptr;
  const int64_t first_pixel = oy * ow;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const float* panel = f.expand.panel(slice);
    const int64_t cols = f.expand.cols(slice);
    TileSetup<T> setup(taps);
    for (int64_t r = 0; r < rows; ++r) {
      const float* a = window + r * sh * row_words;
      if (!project) {
        const Store<T> store_to{y, residual, mid_channels, p.act};
        multiply(a, sw * in, taps, ow, f.expand, panel, slice, p.bn, store_to, first_pixel + r * ow);
        continue;
      }
      float* to = mid + (slice * pixels + r * ow) * kSlice;
      for_each_tile(ow, setup, [&](int64_t begin, int64_t n) {
        run_tile<T>(n, cols, a + begin * sw * in, sw * in, taps, panel, p.bn.scale + slice * kSlice,
                    p.bn.shift + slice * kSlice, to + begin * kSlice, kSlice);
      });
      activate_all(p.act, to, ow * cols, kSlice / cols);
      if constexpr (kPairs<T>) to_operand<T>(to, ow, min64(kSlice, mid_channels - slice * kSlice), nullptr);
    }
  }
  if (!project) return;
  const Taps mid_taps{slices, pixels * kSlice, words<T>(kSlice),
                      words<T>(mid_channels - (slices - 1) * kSlice)};
  const Store<T> store_to{y, residual, f.project.n, kIdentity};
  for (int64_t panel = 0; panel < f.project.panels(); ++panel)
    multiply(mid, kSlice, mid_taps, pixels, f.project, f.project.panel(panel), panel, p.project_bn, store_to,
             first_pixel);
}

static void fused_mbconv(const FusedMBConvParams& p, const Pool& pool) {
  const FusedMBConv f{packed_of(p.weight), packed_of(p.project)};
  const int64_t oh = p.y.size[2], ow = p.y.size[3];
  // As many strips as fit the cache, and a whole number for each thread.
  const int64_t fit = div_up(oh * ow * round_up(f.expand.n, kSlice), kStripFloats);
  const int64_t strips = min64(oh, round_up(fit, pool.threads));
  parallel(pool, p.x.size[0] * strips, [&](int64_t i) {
    const int64_t image = i / strips, strip = i % strips, oy = oh * strip / strips;
    const int64_t rows = oh * (strip + 1) / strips - oy;
    p.x.is_bf16 ? fused_mbconv_strip<bf16>(p, f, image, oy, rows)
                : fused_mbconv_strip<float>(p, f, image, oy, rows);
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
