// Dense 3x3 convolutions at stride 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, Fast
// Algorithms for Convolutional Neural Networks, https://arxiv.org/abs/1509.09308): 16 products of channels
// for 2x2 outputs instead of 36.
//
//   y = A' [sum over channels of (G g G') * (B' d B)] A        (' transposes, * is element by element)
//
// d are 4x4 pixels, g is the window, y are the 2x2 outputs of its places in d. B and A have entries 0, 1 and
// -1, so the transforms of maps are additions; G g G' is made when weights are packed.
//
// Numbers (docs/numerics.md): an output uses the 3x3 pixels of its own window and no other, bit by bit. Its
// error goes with the largest pixel in the window and the largest weight on it, whether the two meet or not.
// So weights must not grow by their transform (`grow_little`), and outputs that see a pixel far larger than
// is usual in its channel (`measure`), or whose sums are not finite, are taken tap by tap (`repair`).
#pragma once

#include <cmath>

#include "gemm.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kPoints = 16;            // products for a tile of 2x2 outputs
constexpr int64_t kWinogradTiles = 64;     // of a strip, about: they share the L2 with a panel of weights
constexpr int64_t kWinogradChannels = 24;  // fewer, and the transforms cost what is saved

// Weights for one panel after the other, [point][C_in][width]; before them a line of flags, one for each
// panel, which say whether its weights are fit for it.
struct Winograd {
  const float* flags;
  Packed weights;  // k: all points

  bool usable() const {
    for (int64_t p = 0; p < weights.panels(); ++p)
      if (flags[p] == 0) return false;
    return true;
  }
};

static inline int64_t flags_of(int64_t channels) { return round_up(div_up(channels, kSlice), kCacheLine); }

static inline Winograd winograd_as(const int64_t (&size)[4], const float* data) {
  return {data, {data + flags_of(size[0]), size[0], kPoints * size[1]}};
}

// The floats that pack_winograd fills for a weight [O][I][KH][KW]; none where this algorithm is not for it.
[[maybe_unused]] static int64_t winograd_floats(const Tensor4& weight, const Window& window) {
  const bool fits =
      weight.size[2] == 3 && weight.size[3] == 3 && window.stride_h == 1 && window.stride_w == 1;
  if (!fits || min64(weight.size[0], weight.size[1]) < kWinogradChannels) return 0;
  if (with_type(weight.type, [](auto of) { return kVnniPairs<decltype(of)>; })) return 0;
  return flags_of(weight.size[0]) + Packed{nullptr, weight.size[0], kPoints * weight.size[1]}.floats();
}

typedef double vdouble __attribute__((vector_size(kWidth * 8)));

// G g of three values.
EFFNET_INLINE void transform_weights(const vdouble (&g)[3], vdouble (&out)[4]) {
  out[0] = g[0];
  out[1] = (g[0] + g[2] + g[1]) * 0.5;
  out[2] = (g[0] + g[2] - g[1]) * 0.5;
  out[3] = g[2];
}

// Squares of an output channel's weights, and of what they are in each of the 2x2 outputs.
struct Squares {
  vdouble weights = {}, outputs[2][2] = {};

  // Whether the transform adds little to the rounding errors of the sums: with weights that do not depend on
  // each other the ratio is 0.7, with all weight on a corner 2.25. And whether the weights are far from the
  // ends of float32.
  auto grow_little() const {
    auto fit = (weights < 1e60) & ((weights == 0) | (weights > 1e-68));
    for (int y = 0; y < 2; ++y)
      for (int x = 0; x < 2; ++x) fit &= outputs[y][x] <= 1.25 * weights;
    return fit;
  }
};

template <class T>
static void pack_winograd_panel(const Tensor4& weight, const Winograd& w, int64_t p, float* flags,
                                float* data) {
  const int64_t in = weight.size[1], width = w.weights.width(p);
  float* out = data + p * kSlice * w.weights.k;
  Squares squares[kVectors];
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t j = 0; j < width; j += kWidth) {
      const int64_t first = p * kSlice + j, valid = min64(kWidth, w.weights.n - first);
      Squares& of = squares[j / kWidth];
      vdouble rows[4][3];  // G g
      for (int x = 0; x < 3; ++x) {
        vdouble column[3], turned[4];
        for (int y = 0; y < 3; ++y) {
          const T* from = static_cast<const T*>(weight.data) + i * weight.stride[1] + y * weight.stride[2] +
                          x * weight.stride[3];
          float lanes[kWidth] = {};
          for (int64_t o = 0; o < valid; ++o) lanes[o] = to_float(from[(first + o) * weight.stride[0]]);
          column[y] = __builtin_convertvector(load(lanes), vdouble);
          of.weights += column[y] * column[y];
        }
        transform_weights(column, turned);
        for (int y = 0; y < 4; ++y) rows[y][x] = turned[y];
      }
      for (int y = 0; y < 4; ++y) {
        vdouble points[4];
        transform_weights(rows[y], points);
        for (int x = 0; x < 4; ++x) {
          store(out + ((y * 4 + x) * in + i) * width + j, __builtin_convertvector(points[x], vf));
          for (int at = 0; at < 4; ++at)  // the outputs that take this point
            if (const int oy = at / 2, ox = at % 2; y >= oy && y < oy + 3 && x >= ox && x < ox + 3)
              of.outputs[oy][ox] += points[x] * points[x];
        }
      }
    }
  }
  bool all = true;
  for (int64_t j = 0; j < width / kWidth; ++j) {
    const auto fit = squares[j].grow_little();
    for (int lane = 0; lane < kWidth; ++lane) all = all && fit[lane] != 0;
  }
  flags[p] = all ? 1.0f : 0.0f;
}

[[maybe_unused]] static void pack_winograd(const Tensor4& weight, float* data, const Pool& pool) {
  const Winograd w = winograd_as(weight.size, data);
  parallel(pool, w.weights.panels(), [&](int64_t p) {
    float* const panels = data + flags_of(weight.size[0]);
    with_type(weight.type, [&](auto of) { pack_winograd_panel<decltype(of)>(weight, w, p, data, panels); });
  });
}

// ---- maps ------------------------------------------------------------------------------------------------

constexpr int64_t kWinogradPixels = 256;  // of a map at least: of fewer one large pixel makes up the mean
constexpr float kLarge = 12;              // times the root mean square of the channel

// What is usual in an image: up to which size the pixels of each channel are, and in which rows all are.
struct Usual {
  const float* limits;
  const float* rows;  // 0 where all are
};

static inline vi size_bits(vf v) { return (vi)v & 0x7fffffff; }  // ordered as sizes are, NaN above all

// Sums of squares of a row's pixels and the bits of the largest, [C] each up to whole vectors.
template <class T>
static void measure_row(const Tensor4& x, int64_t image, int64_t y, float* squares, float* largest) {
  const T* row = at<const T>(x, image) + y * x.stride[2];
  const int64_t channels = x.size[1];
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t left = min64(kWidth, channels - c);
    vf sum = {};
    vi most = {};
    for (int64_t i = 0; i < x.size[3]; ++i) {
      const T* pixel = row + i * x.stride[3] + c * x.stride[1];
      vf v;
      if (x.stride[1] == 1) {
        v = load_first(pixel, left);
      } else {
        float lanes[kWidth] = {};
        for (int64_t j = 0; j < left; ++j) lanes[j] = to_float(pixel[j * x.stride[1]]);
        v = load(lanes);
      }
      const vi size = size_bits(v);
      most = size > most ? size : most;
      sum += (vf)((vi)(v * v) & (v * v < 1e36f));  // what is too large to be squared is large in any case
    }
    store(squares + c, sum);
    store(largest + c, (vf)most);
  }
}

// The same for whole images, row by row and in one order; memory is the caller's.
template <class T>
static const Usual* measure(const Tensor4& x, const Pool& pool, Scratch& scratch) {
  const int64_t images = x.size[0], h = x.size[2], padded = round_up(x.size[1], kWidth);
  float* squares = scratch.take(images * h * padded);
  float* largest = scratch.take(images * h * padded);
  float* limits = scratch.take(images * padded);
  float* rows = scratch.take(images * h);
  auto* usual = reinterpret_cast<Usual*>(scratch.take(images * (sizeof(Usual) / sizeof(float))));
  parallel(pool, images * h,
           [&](int64_t i) { measure_row<T>(x, i / h, i % h, squares + i * padded, largest + i * padded); });
  for (int64_t image = 0; image < images; ++image) {
    float* limit = limits + image * padded;
    for (int64_t c = 0; c < padded; ++c) {
      float sum = 0;
      for (int64_t y = 0; y < h; ++y) sum += squares[(image * h + y) * padded + c];
      limit[c] = kLarge * std::sqrt(sum / static_cast<float>(h * x.size[3]));
    }
    for (int64_t y = 0; y < h; ++y) {
      vi large = {};
      for (int64_t c = 0; c < padded; c += kWidth)
        large |= (vi)load(largest + (image * h + y) * padded + c) > (vi)load(limit + c);
      rows[image * h + y] = any(large) ? 1.0f : 0.0f;
    }
    usual[image] = {limit, rows + image * h};
  }
  return usual;
}

// B' d of four values.
EFFNET_INLINE void transform_pixels(const vf (&d)[4], vf (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// The operands of one tile and one vector of channels, at points `apart`, of 4x4 pixels whose rows are `row`
// and whose columns are `column` apart: load(p) and store(p, v) for all or the last channels.
template <class Load, class Store>
EFFNET_INLINE void transform_tile(const float* pixels, int64_t row, int64_t column, float* to, int64_t apart,
                                  const Load& load, const Store& store) {
  vf columns[4][4];  // B' d, [x][y]
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    vf d[4];
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) d[y] = load(pixels + y * row + x * column);
    transform_pixels(d, columns[x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    vf d[4], points[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) d[x] = columns[x][y];
    transform_pixels(d, points);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) store(to + (y * 4 + x) * apart, points[x]);
  }
}

// A' m A: the sums of 2x2 outputs, one vector of channels, from the products of the points.
EFFNET_INLINE void transform_products(const float* products, int64_t apart, vf (&y)[2][2]) {
  vf rows[2][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    vf m[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) m[i] = load(products + (i * 4 + x) * apart);
    rows[0][x] = m[0] + m[1] + m[2];
    rows[1][x] = m[1] - m[2] - m[3];
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[i][0] = rows[i][0] + rows[i][1] + rows[i][2];
    y[i][1] = rows[i][1] - rows[i][2] - rows[i][3];
  }
}

// Strips of whole tiles, for one thread at a time.
struct WinogradStrip {
  const float* window;  // rows of pixels as the microkernel takes them, `width` to a row, for repairs
  int64_t width, in;
  int64_t rows, ow;  // of outputs
  int64_t tiles_h, tiles_w;
  float *operands, *products;
  uint8_t* large = nullptr;  // of each output, whether its window has a large pixel; null where none has

  int64_t tiles() const { return tiles_h * tiles_w; }

  void transform() const {
    for (int64_t t = 0; t < tiles(); ++t) {
      const float* from = window + (t / tiles_w * 2 * width + t % tiles_w * 2) * in;
      float* to = operands + t * in;
      int64_t c = 0;
      for (; c + kWidth <= in; c += kWidth)
        transform_tile(
            from + c, width * in, in, to + c, tiles() * in, [](const float* p) { return load(p); },
            [](float* p, vf v) { store(p, v); });
      if (const int64_t left = in - c; left > 0)
        transform_tile(
            from + c, width * in, in, to + c, tiles() * in,
            [&](const float* p) { return load_first(p, left); },
            [&](float* p, vf v) { store_first(p, v, left); });
    }
  }

  // Finds the outputs that see a large pixel; row `first` of the map is the first of the window.
  void mark(const Usual& usual, int64_t first, int64_t h, Scratch& scratch) {
    const int64_t window_rows = 2 * tiles_h + 2;
    bool some = false;
    for (int64_t y = max64(0, first); y < min64(h, first + window_rows); ++y) some |= usual.rows[y] != 0;
    if (!some) return;
    large = reinterpret_cast<uint8_t*>(scratch.take(div_up(rows * ow, 4)));
    std::memset(large, 0, rows * ow);
    for (int64_t y = max64(0, -first); y < min64(h - first, window_rows); ++y) {
      if (usual.rows[first + y] == 0) continue;
      for (int64_t x = 0; x < width; ++x) {
        vi found = {};
        for (int64_t c = 0; c < in; c += kWidth)
          found |=
              size_bits(load_first(window + (y * width + x) * in + c, in - c)) > (vi)load(usual.limits + c);
        if (!any(found)) continue;
        for (int64_t r = max64(0, y - 2); r <= min64(rows - 1, y); ++r)
          for (int64_t o = max64(0, x - 2); o <= min64(ow - 1, x); ++o) large[r * ow + o] = 1;
      }
    }
  }

  // The convolution and its norm for one panel, to row(r) + x * step for pixel x of output row r.
  template <class Row>
  void convolve(const Packed& direct, const Packed& weights, int64_t panel, const Affine& affine,
                int64_t step, const Row& row) const {
    const int64_t n = weights.width(panel), cols = weights.cols(panel), apart = tiles() * n;
    const Taps taps{1, 0, in, in};
    MicrokernelSetup<float> setup(taps);
    alignas(64) float ones[kSlice], zeros[kSlice] = {};
    for (float& one : ones) one = 1.0f;
    const Affine identity{ones, zeros};
    for (int64_t point = 0; point < kPoints; ++point) {
      const float* a = operands + point * tiles() * in;
      for_each_block(tiles(), setup, [&](int64_t begin, int64_t count) {
        run_microkernel<float>(count, cols,
                               {a + begin * in, in, taps, weights.panel(panel) + point * in * n, identity,
                                products + point * apart + begin * n, n});
      });
    }
    const float *scale = affine.scale + panel * kSlice, *shift = affine.shift + panel * kSlice;
    vf spoilt = {};  // NaN where a sum is not finite
    each_output(n, [&](int64_t r, int64_t x, int64_t j, vf sum) {
      spoilt += sum * 0.0f;
      store(row(r) + x * step + j, sum * load(scale + j) + load(shift + j));
    });
    const bool finite = sum_lanes(spoilt) == 0;
    if (large != nullptr || !finite) repair(direct, panel, {scale, shift}, n, step, row, finite);
  }

 private:
  template <class Body>
  void each_output(int64_t n, const Body& body) const {
    const int64_t apart = tiles() * n;
    for (int64_t t = 0; t < tiles(); ++t) {
      const int64_t r = t / tiles_w * 2, x = t % tiles_w * 2;
      for (int64_t j = 0; j < n; j += kWidth) {
        vf y[2][2];
        transform_products(products + t * n + j, apart, y);
        body(r, x, j, y[0][0]);
        if (x + 1 < ow) body(r, x + 1, j, y[0][1]);
        if (r + 1 == rows) continue;
        body(r + 1, x, j, y[1][0]);
        if (x + 1 < ow) body(r + 1, x + 1, j, y[1][1]);
      }
    }
  }

  // Outputs that see a large pixel, and those with a sum that is not finite (one infinity in a window gives
  // an infinity there, and here a difference of two), tap by tap.
  template <class Row>
  void repair(const Packed& direct, int64_t panel, const Affine& affine, int64_t n, int64_t step,
              const Row& row, bool finite) const {
    Scratch scratch;
    auto* bad = reinterpret_cast<uint8_t*>(scratch.take(div_up(rows * ow, 4)));
    if (large != nullptr)
      std::memcpy(bad, large, rows * ow);
    else
      std::memset(bad, 0, rows * ow);
    if (!finite)
      each_output(n, [&](int64_t r, int64_t x, int64_t, vf sum) {
        if (sum_lanes(sum * 0.0f) != 0) bad[r * ow + x] = 1;
      });
    const Taps taps{3, width * in, 3 * in, 3 * in};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = 0; x < ow;) {
        int64_t end = x;
        while (end < min64(ow, x + kMr) && bad[r * ow + end] != 0) ++end;
        if (end > x)
          run_microkernel<float>(end - x, direct.cols(panel),
                                 {window + (r * width + x) * in, in, taps, direct.panel(panel), affine,
                                  row(r) + x * step, step});
        x = max64(end, x + 1);
      }
  }
};

}  // namespace EFFNET_ISA
}  // namespace effnet
