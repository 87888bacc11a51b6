// mbconv: expand -> depthwise + means -> SE gate -> project, one image at a time.
//
// The expanded map is never whole: a channel slice of it exists as the KH rows that the depthwise window
// sees, in L1 or L2. The depthwise output of one image is kept, in slices, because SE needs all of it before
// the first product with the gate. The gate goes into the smaller operand of the projection. Without SE large
// maps are done in bands of rows, each from x to y, whose depthwise output stays in L2.
#pragma once

#include "depthwise_conv_bn_act.h"
#include "pointwise_conv_bn_act.h"
#include "squeeze_excite.h"

namespace effnet {
namespace EFFNET_ISA {

struct MBConv {
  Depthwise depthwise;
  Packed expand, project;
};

// to = panel with row k multiplied by gate[k].
static inline void scale_panel(const float* panel, int64_t k, int64_t cols, const float* gate, float* to) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < cols; ++j)
      store(to + (i * cols + j) * kWidth, load(panel + (i * cols + j) * kWidth) * gate[i]);
}

// A channel slice of the depthwise output: calls run(fill, target, finish), as depthwise_image has it. rows:
// x in words, for the expand GEMM, where there is one. The panel of slice `next` is fetched ahead.
template <class T, class Run, class Target>
static void expand_slice(const MBConvParams& p, const MBConv& m, const T* x, const float* rows, int64_t slice,
                         int64_t next, const Run& run, const Target& target) {
  const int64_t in = p.x.size[1], w = m.depthwise.w, cols = m.depthwise.cols(slice);
  const auto finish = [](int64_t, const float*) {};
  if (p.expand.packed == nullptr) {
    run([&](int64_t iy, int64_t n, const Ring& ring) { copy_rows(x, w, in, slice, cols, iy, n, ring); },
        target, finish);
    return;
  }
  const int64_t k = words<T>(in), width = cols * kWidth;
  const Taps taps{1, 0, k, k};
  MicrokernelSetup<T> setup(taps);
  const float *panel = m.expand.panel(slice), *ahead = m.expand.next(next);
  const Affine affine = from_channel(p.expand_bn, slice * kSlice);
  Scratch scratch;
  float* line = scratch.take(rows_at_once(w) * w * kSlice);
  const auto fill = [&](int64_t iy, int64_t n, const Ring& ring) {
    const float* a = rows + iy * w * k;
    int64_t number = 0;
    for_each_block(n * w, setup, [&](int64_t begin, int64_t count) {
      run_microkernel<T>(count, cols, {a + begin * k, k, taps, panel, affine, line + begin * width, width},
                         iy == 0 ? ahead_of(ahead, number++, k) : nullptr);
    });
    activate_rows(m.depthwise.act, line, n, w * cols, kSlice / cols, [&](int64_t y) { return ring(iy + y); });
  };
  run(fill, target, finish);
}

// Into how many bands of rows to cut an image, or 1: as many as keep the depthwise output of one in L2, the
// same number for every thread. The rows that two bands see are expanded twice: at most a third of a band.
static inline int64_t bands_of(const MBConvParams& p, const Depthwise& d, int64_t threads) {
  constexpr int64_t kBand = 96 * 1024;  // floats
  const int64_t needed = div_up(d.slices() * kSlice * d.oh * d.ow, kBand);
  if (p.se.channels > 0 || needed == 1) return 1;
  const int64_t seen_twice = max64(0, d.kh - d.window.stride_h);
  const int64_t most = min64(d.oh, d.oh * d.window.stride_h / max64(1, 3 * seen_twice));
  return max64(1, min64(div_up(needed, threads), most / threads) * threads);
}

// One image without SE, band by band.
template <class T>
static void mbconv_bands(const MBConvParams& p, const MBConv& m, const T* x, const float* rows,
                         const Epilogue<T>& epilogue, int64_t bands, const Pool& pool) {
  Depthwise d = m.depthwise;
  d.strips = bands;  // nobody asks for their sums, so they may depend on the threads
  const int64_t slices = d.slices();
  parallel(pool, bands, [&](int64_t band) {
    const int64_t top = d.strip_begin(band), pixels = (d.strip_begin(band + 1) - top) * d.ow;
    Scratch scratch;
    float* mid = scratch.take(slices * pixels * kSlice);  // [slice][pixel][kSlice]
    float* sums = scratch.take(slices * kSlice);
    for (int64_t slice = 0; slice < slices; ++slice) {
      float* of_slice = mid + slice * pixels * kSlice;
      expand_slice(
          p, m, x, rows, slice, slice + 1,
          [&](const auto& fill, const auto& target, const auto& finish) {
            depthwise_strips(d, slice, band, band + 1, sums, 0, fill, target, finish);
          },
          [&](int64_t oy) { return of_slice + (oy - top) * d.ow * kSlice; });
      if (kVnniPairs<T>) to_operand<T>(of_slice, pixels, min64(kSlice, d.channels - slice * kSlice), nullptr);
    }
    const Taps taps{slices, pixels * kSlice, words<T>(kSlice), words<T>(d.channels - (slices - 1) * kSlice)};
    for (int64_t panel = 0; panel < m.project.panels(); ++panel)
      multiply({mid, kSlice, taps, pixels}, m.project, panel, p.project_bn, epilogue, top * d.ow);
  });
}

template <class T>
static void mbconv_image(const MBConvParams& p, const MBConv& m, int64_t image, const Pool& pool) {
  const Depthwise& d = m.depthwise;
  const int64_t in = p.x.size[1], out = m.project.n, pixels = d.oh * d.ow, slices = d.slices();
  const T* x = at<const T>(p.x, image);
  const Epilogue<T> epilogue{at<T>(p.y, image), p.residual ? x : nullptr, out,
                             act_for(p.x.type, p.project_act)};
  const Pool alone;
  Scratch scratch;

  const float* rows = nullptr;  // x in words, for the expand GEMM
  if (p.expand.packed) rows = rows_of(x, d.h * d.w, in, static_cast<const float*>(nullptr), scratch);
  if (const int64_t bands = bands_of(p, d, pool.threads); bands > 1) {
    mbconv_bands(p, m, x, rows, epilogue, bands, pool);
    return;
  }

  float* mid = scratch.take(slices * pixels * kSlice);  // [slice][pixel][kSlice]
  float* mean = scratch.take(slices * kSlice);
  float* gate = scratch.take(slices * kSlice);
  depthwise_image(d, pool, p.se.channels > 0 ? mean : nullptr, [&](int64_t slice, const auto& run) {
    expand_slice(p, m, x, rows, slice, slice + pool.threads, run,
                 [&](int64_t oy) { return mid + (slice * pixels + oy * d.ow) * kSlice; });
  });

  Packed project = m.project;
  const bool gated = p.se.channels > 0;
  if (gated) {
    gate_of_image(p.se, mean, gate, pool);
    for (int64_t c = d.channels; c < slices * kSlice; ++c) gate[c] = 0;
  }
  // Pairs have to be made of the map in any case, and gated weights would be rounded where stock's are not.
  const bool of_map = kVnniPairs<T> || (gated && pixels <= out);
  const bool small = d.channels * (of_map ? pixels : out) < (1 << 16);
  if (of_map) {
    parallel(small ? alone : pool, slices, [&](int64_t slice) {
      to_operand<T>(mid + slice * pixels * kSlice, pixels, min64(kSlice, d.channels - slice * kSlice),
                    gated ? gate + slice * kSlice : nullptr);
    });
  } else if (gated) {
    float* scaled = scratch.take(m.project.floats());
    parallel(small ? alone : pool, m.project.panels(), [&](int64_t panel) {
      const float* from = m.project.panel(panel);
      scale_panel(from, m.project.k, m.project.cols(panel), gate, scaled + (from - m.project.data));
    });
    project.data = scaled;
  }

  const Taps taps{slices, pixels * kSlice, words<T>(kSlice), words<T>(d.channels - (slices - 1) * kSlice)};
  const int64_t panels = project.panels();
  const int64_t blocks = div_up(pixels, kPixelBlock);
  parallel(pool, blocks * panels, [&](int64_t i) {
    const int64_t panel = i % panels, block = i / panels, first = pixels * block / blocks;
    multiply({mid + first * kSlice, kSlice, taps, pixels * (block + 1) / blocks - first}, project, panel,
             p.project_bn, epilogue, first,
             project.data == m.project.data ? project.next(panel + pool.threads) : nullptr);
  });
}

static void mbconv(const MBConvParams& p, const Pool& pool) {
  const MBConv m{make_depthwise(p.weight, p.bn, p.window, p.act, p.x, p.y), packed_of(p.expand),
                 packed_of(p.project)};
  parallel_images(pool, p.x.size[0], [&](int64_t image, const Pool& inner) {
    with_type(p.x.type, [&](auto of) { mbconv_image<decltype(of)>(p, m, image, inner); });
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
