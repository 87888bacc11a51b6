// The depthwise convolution in training over [N, H, W, C]: forward behind the BatchNorm and activation of the
// layer above, with the statistics of its output; and the whole backward in one pass.
//
// Backward reads the output's gradient and raw map, and the input's raw map, and writes the input's gradient.
// A block takes some channels and a tile of the input, and goes down the map. With every step it forms one
// row of dy = p * dz + q * (y - mean) + r in fp32, each element once (halo apart), in a ring of rows in
// shared memory. A thread has a strip of kWidth input columns of kChannels channels. Every value of dy that
// it reads from the ring meets the same tap twice:
//
//     dx[pixel] += tap * dy    and    dtap += a[pixel] * dy
//
// so the activated input a needs no halo, is computed once in registers with its derivative, and the
// gradients of the taps stay in registers down the tile. Forward is the gather alone, over a ring of
// activated input rows.
//
// Sums over pixels (weight, the next BatchNorm's two moments, statistics) are taken per thread, then per
// block over its strips, then over the blocks by a second small kernel, always in an order that follows from
// the shape.
//
// Budget: backward at stride 1 moves 8 bytes an element in 16 bits, for which an H100 at 3.35 TB/s has 70
// lane-instructions and 17 fp32 values from shared memory. A 3x3 window takes 18 of the former for products
// and 18 of the latter, a 5x5 window 50 and 22: by this count, which is no measurement, shared memory bounds
// both. What a thread takes is what fits the registers of three blocks of 128 threads without spilling: for a
// 3x3 window four channels of two columns (36 gradients of taps), for a 5x5 two of four (50); 7x7, and C that
// is no multiple of these, one of four.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"

namespace effnet::cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kSharedBytes = 48 * 1024;
constexpr int kEnoughBlocks = 1024;

// Where the blocks and threads lie; it follows from the shape alone.
struct Geometry {
  int strips = 1;   // of kWidth columns, side by side in a block
  int vectors = 1;  // of kChannels channels, in a block
  int chunks = 1;   // blocks side by side that cover all channels
  int tiles_w = 1;  // blocks side by side that cover a row
  int tiles_h = 1;  // blocks that cover a column, `rows` steps each
  int rows = 1;
  int images = 1;  // of a block, one after the other
  int64_t groups = 0;

  __host__ __device__ int64_t parts() const { return groups * tiles_h * tiles_w; }
};

template <class Params>
struct Launch {
  Params p;
  Geometry g;
};

// One block's share.
struct Tile {
  int chunk, tile_w, tile_h;
  int64_t group, part;  // part: where its sums go

  __device__ __forceinline__ explicit Tile(const Geometry& g) {
    unsigned block = blockIdx.x;
    chunk = static_cast<int>(block % static_cast<unsigned>(g.chunks));
    block /= static_cast<unsigned>(g.chunks);
    part = block;
    tile_w = static_cast<int>(block % static_cast<unsigned>(g.tiles_w));
    block /= static_cast<unsigned>(g.tiles_w);
    tile_h = static_cast<int>(block % static_cast<unsigned>(g.tiles_h));
    group = block / static_cast<unsigned>(g.tiles_h);
  }
};

// kChannels neighbouring floats in shared memory.
template <int kChannels>
__device__ __forceinline__ void load_floats(const float* from, float (&out)[kChannels]) {
  Vec<float, kChannels>::load(from).to_floats(out);
}

template <int kChannels>
__device__ __forceinline__ void store_floats(float* to, const float (&in)[kChannels]) {
  Vec<float, kChannels>::from_floats(in).store(to);
}

// Activations in place, and their derivatives; at the kinks the choice is torch's.
template <bool kExact, int kCount>
__device__ __forceinline__ void curves(int act, float (&z)[kCount], float (&slope)[kCount]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) f(z[i], slope[i]);
  };
  switch (act) {
    case kRelu:
      return each([](float& x, float& d) {
        d = x <= 0.0f ? 0.0f : 1.0f;
        x = at_least(x, 0.0f);
      });
    case kRelu6:
      return each([](float& x, float& d) {
        d = x <= 0.0f || x >= 6.0f ? 0.0f : 1.0f;
        x = at_most(at_least(x, 0.0f), 6.0f);
      });
    case kSilu:
      return each([](float& x, float& d) {
        const float s = sigmoid<kExact>(x);
        d = s * fmaf(x, 1.0f - s, 1.0f);
        x *= s;
      });
    case kHardswish:
      return each([](float& x, float& d) {
        const float inner = fmaf(x, 1.0f / 3.0f, 0.5f);
        d = x <= -3.0f ? 0.0f : x >= 3.0f ? 1.0f : inner;
        x = activate<kExact>(kHardswish, x);
      });
    default:
      return each([](float&, float& d) { d = 1.0f; });
  }
}

// ---- backward --------------------------------------------------------------------------------------------

template <class T_, int kKernel_, int kStride_, int kChannels_>
struct Backward {
  using T = T_;
  using Params = TrainDepthwiseBackwardParams;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kChannels = kChannels_;
  // As registers allow.
  static constexpr int most_channels() { return kKernel == 3 ? 4 : kKernel == 5 ? 2 : 1; }
  static constexpr int kWidth = kKernel == 3 && kChannels == 4 ? 2 : 4;  // input columns of a thread
  static constexpr int kOpen = (kKernel + kStride - 1) / kStride;        // rows of dy that an input row sees
  static constexpr int kSlots = kOpen + 1;                               // of the ring: one is being written
  static constexpr int kHalo = (kKernel - 1) / kStride;      // columns of dy left of a strip's first
  static constexpr int kColumns = kWidth / kStride + kHalo;  // of dy that a strip sees
  static constexpr int kBatch = 3;                           // of dy that a thread forms at once
  static constexpr int kTaps = kKernel * kKernel, kSums = kTaps + 2;
  // Vectors in shared memory: the taps; scale, shift and mean, p, q and r, gate and bias of the output;
  // scale, shift, mean and rstd of the input.
  static constexpr int kOutput = kTaps, kInput = kTaps + 8, kVectors = kTaps + 12;

  static __host__ __device__ int ring_columns(const Geometry& g) {
    return g.strips * kWidth / kStride + kHalo;
  }
  // Floats of a block; the sums at the end take the place of the ring.
  static int shared_floats(const Geometry& g) {
    return g.vectors * kChannels * (kVectors + std::max(kSlots * ring_columns(g), g.strips * kSums));
  }
  // In padded coordinates the input's columns and rows begin at the padding: strips and steps begin at
  // multiples of the stride.
  static int columns(const Params& p) { return p.window.left % kStride + p.w; }
  static int steps(const Params& p) {
    return (p.window.top + p.h - 1) / kStride - p.window.top / kStride + 1;
  }
};

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, 3)
    backward_kernel(const __grid_constant__ Launch<TrainDepthwiseBackwardParams> launch) {
  using T = typename Tr::T;
  constexpr int kChannels = Tr::kChannels, kWidth = Tr::kWidth, kKernel = Tr::kKernel, kStride = Tr::kStride;
  constexpr bool kExact = !kIs16Bit<T>;
  using Channels = Vec<T, kChannels>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const TrainDepthwiseBackwardParams& p = launch.p;
  const Geometry& g = launch.g;
  const Tile tile(g);
  const int block_channels = g.vectors * kChannels;
  const int first_channel = tile.chunk * block_channels;
  const int channels = min(block_channels, p.c - first_channel);
  float* const vectors = reinterpret_cast<float*>(shared_memory);  // [kVectors][block_channels]
  float* const ring = vectors + Tr::kVectors * block_channels;     // [kSlots][ring columns][block_channels]

  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    const int c = first_channel + i;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * Tr::kTaps;
    for (int k = 0; k < Tr::kTaps; ++k) vectors[k * block_channels + i] = to_float(weight[k]);
    for (int k = 0; k < 3; ++k) {
      vectors[(Tr::kOutput + k) * block_channels + i] = p.norm[static_cast<int64_t>(k) * p.c + c];
      vectors[(Tr::kOutput + 3 + k) * block_channels + i] = p.coefficients[static_cast<int64_t>(k) * p.c + c];
    }
    for (int k = 0; k < 4; ++k) {
      const float none = k == 0 || k == 3 ? 1.0f : 0.0f;
      vectors[(Tr::kInput + k) * block_channels + i] =
          p.x_norm == nullptr ? none : p.x_norm[static_cast<int64_t>(k) * p.c + c];
    }
  }

  const int v = static_cast<int>(threadIdx.x) % g.vectors;
  const int strip = static_cast<int>(threadIdx.x) / g.vectors;
  const int channel = v * kChannels;
  const bool works = strip < g.strips && channel < channels;
  const auto vector = [&](int k, float (&out)[kChannels]) {
    load_floats(vectors + k * block_channels + channel, out);
  };

  // Padded columns; those of this thread, and the first of dy in the ring.
  const int tile_column = p.window.left / kStride * kStride + tile.tile_w * g.strips * kWidth;
  const int x_column = tile_column + strip * kWidth - p.window.left;
  const int ring_columns = Tr::ring_columns(g);
  const int dy_column = tile_column / kStride - Tr::kHalo;
  const int slot_floats = ring_columns * block_channels;
  uint32_t inside = 0;  // bit i: column i of the strip is there
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (works && x_column + i >= 0 && x_column + i < p.w) inside |= 1u << i;
  }

  const int top_step = p.window.top / kStride;
  const int first_step = top_step + tile.tile_h * g.rows;
  const int end_step = min(first_step + g.rows, (p.window.top + p.h - 1) / kStride + 1);
  const int64_t first_image = tile.group * g.images;
  const int64_t end_image = min(first_image + g.images, p.n);

  float dtaps[Tr::kTaps][kChannels] = {};
  float sum[kChannels] = {}, product[kChannels] = {};
  for (int64_t n = first_image; n < end_image; ++n) {
    __syncthreads();  // nobody reads the ring and the gate of the image before
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
      const int64_t at = n * p.c + first_channel + i;
      vectors[(Tr::kOutput + 6) * block_channels + i] = p.gate == nullptr ? 1.0f : p.gate[at];
      vectors[(Tr::kOutput + 7) * block_channels + i] = p.bias == nullptr ? 0.0f : p.bias[at];
    }
    __syncthreads();

    // Row `row` of dy, into its place in the ring. Outside of the map it is zero.
    const auto form = [&](int row) {
      if (!works) return;
      const bool there = row >= 0 && row < p.oh;
      float* const to = ring + (row + Tr::kSlots) % Tr::kSlots * slot_floats + channel;
      const int64_t map = ((n * p.oh + row) * p.ow + dy_column) * p.c + first_channel + channel;
      for (int first = strip; first < ring_columns; first += Tr::kBatch * g.strips) {
        Channels loaded_grad[Tr::kBatch], loaded_raw[Tr::kBatch];
        bool has[Tr::kBatch];
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          const int column = first + b * g.strips;
          has[b] = there && column < ring_columns && dy_column + column >= 0 && dy_column + column < p.ow;
          loaded_grad[b] = loaded_raw[b] = Channels::zero();
          if (!has[b]) continue;
          const int64_t at = map + static_cast<int64_t>(column) * p.c;
          if (p.grad != nullptr) loaded_grad[b] = Channels::load_constant(static_cast<const T*>(p.grad) + at);
          if (p.raw != nullptr) loaded_raw[b] = Channels::load_constant(static_cast<const T*>(p.raw) + at);
        }
        float z[Tr::kBatch * kChannels], slope[Tr::kBatch * kChannels];
        {
          float scale[kChannels], shift[kChannels];
          vector(Tr::kOutput, scale);
          vector(Tr::kOutput + 1, shift);
#pragma unroll
          for (int b = 0; b < Tr::kBatch; ++b) {
            float y[kChannels];
            loaded_raw[b].to_floats(y);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) z[b * kChannels + c] = fmaf(y[c], scale[c], shift[c]);
          }
        }
        curves<kExact>(p.act, z, slope);
        float mean[kChannels], pp[kChannels], q[kChannels], r[kChannels], gate[kChannels], bias[kChannels];
        vector(Tr::kOutput + 2, mean);
        vector(Tr::kOutput + 3, pp);
        vector(Tr::kOutput + 4, q);
        vector(Tr::kOutput + 5, r);
        vector(Tr::kOutput + 6, gate);
        vector(Tr::kOutput + 7, bias);
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          const int column = first + b * g.strips;
          if (column >= ring_columns) continue;
          float grad[kChannels], y[kChannels], dy[kChannels];
          loaded_grad[b].to_floats(grad);
          loaded_raw[b].to_floats(y);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const float dz = fmaf(grad[c], gate[c], bias[c]) * slope[b * kChannels + c];
            dy[c] = has[b] ? fmaf(pp[c], dz, fmaf(q[c], y[c] - mean[c], r[c])) : 0.0f;
          }
          store_floats(to + column * block_channels, dy);
        }
      }
    };

    Channels loaded[kWidth];
    const auto load_row = [&](int row) {
      const bool there = p.x != nullptr && row >= 0 && row < p.h;
      const int64_t at = ((n * p.h + row) * p.w + x_column) * p.c + first_channel + channel;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        loaded[i] = Channels::zero();
        if (there && (inside >> i & 1)) {
          loaded[i] =
              Channels::load_constant(static_cast<const T*>(p.x) + at + static_cast<int64_t>(i) * p.c);
        }
      }
    };

    for (int row = first_step - Tr::kOpen + 1; row < first_step; ++row) form(row);
#pragma unroll 1
    for (int step = first_step; step < end_step; ++step) {
      load_row(step * kStride - p.window.top);
      form(step);
      __syncthreads();
#pragma unroll
      for (int phase = 0; phase < kStride; ++phase) {
        const int row = step * kStride + phase - p.window.top;
        if (phase > 0) load_row(row);
        if (row < 0 || row >= p.h || inside == 0) continue;
        float a[kWidth * kChannels], slope[kWidth * kChannels];
        {
          float scale[kChannels], shift[kChannels];
          vector(Tr::kInput, scale);
          vector(Tr::kInput + 1, shift);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            float x[kChannels];
            loaded[i].to_floats(x);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) a[i * kChannels + c] = fmaf(x[c], scale[c], shift[c]);
          }
        }
        curves<kExact>(p.x_act, a, slope);
#pragma unroll
        for (int i = 0; i < kWidth * kChannels; ++i) {
          if (!(inside >> (i / kChannels) & 1)) a[i] = 0.0f;
        }

        float dx[kWidth][kChannels] = {};
#pragma unroll
        for (int j = 0; j < Tr::kOpen; ++j) {
          const int kh = phase + kStride * j;
          if (kh >= kKernel) continue;
          const float* const from = ring + (step - j + Tr::kSlots) % Tr::kSlots * slot_floats +
                                    strip * (kWidth / kStride) * block_channels + channel;
          float taps[kKernel][kChannels];
#pragma unroll
          for (int kw = 0; kw < kKernel; ++kw) vector(kh * kKernel + kw, taps[kw]);
#pragma unroll
          for (int column = 0; column < Tr::kColumns; ++column) {
            float dy[kChannels];
            load_floats(from + column * block_channels, dy);
#pragma unroll
            for (int kw = 0; kw < kKernel; ++kw) {
              const int i = (column - Tr::kHalo) * kStride + kw;  // the pixel that meets dy at this tap
              if (i < 0 || i >= kWidth) continue;
#pragma unroll
              for (int c = 0; c < kChannels; ++c) {
                float& dtap = dtaps[kh * kKernel + kw][c];
                dx[i][c] = fmaf(dy[c], taps[kw][c], dx[i][c]);
                dtap = fmaf(dy[c], a[i * kChannels + c], dtap);
              }
            }
          }
        }

        float mean[kChannels], rstd[kChannels];
        vector(Tr::kInput + 2, mean);
        vector(Tr::kInput + 3, rstd);
        const int64_t at = ((n * p.h + row) * p.w + x_column) * p.c + first_channel + channel;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (!(inside >> i & 1)) continue;
          float x[kChannels];
          loaded[i].to_floats(x);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            dx[i][c] *= slope[i * kChannels + c];
            sum[c] += dx[i][c];
            product[c] = fmaf(dx[i][c], (x[c] - mean[c]) * rstd[c], product[c]);
          }
          if (p.dx != nullptr) {
            Channels::from_floats(dx[i]).store(static_cast<T*>(p.dx) + at + static_cast<int64_t>(i) * p.c);
          }
        }
      }
    }
  }

  // Sums over the block's strips, in order.
  float* const strip_sums = ring;  // [strips][kSums][block_channels]
  __syncthreads();
  if (works) {
    float* const to = strip_sums + strip * Tr::kSums * block_channels + channel;
#pragma unroll
    for (int k = 0; k < Tr::kTaps; ++k) store_floats(to + k * block_channels, dtaps[k]);
    store_floats(to + Tr::kTaps * block_channels, sum);
    store_floats(to + (Tr::kTaps + 1) * block_channels, product);
  }
  __syncthreads();
  float* const part = p.partial + tile.part * Tr::kSums * p.c + first_channel;
  for (int i = static_cast<int>(threadIdx.x); i < Tr::kSums * block_channels;
       i += static_cast<int>(blockDim.x)) {
    const int k = i / block_channels, c = i % block_channels;
    if (c >= channels) continue;
    float total = 0;
    for (int s = 0; s < g.strips; ++s) total += strip_sums[s * Tr::kSums * block_channels + i];
    part[static_cast<int64_t>(k) * p.c + c] = total;
  }
}

// ---- forward ---------------------------------------------------------------------------------------------

template <class T_, int kKernel_, int kStride_, int kChannels_>
struct Forward {
  using T = T_;
  using Params = TrainDepthwiseParams;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kChannels = kChannels_;
  static constexpr int most_channels() { return 4; }
  static constexpr int kWidth = kStride == 1 ? 4 : 2;                // output columns of a thread
  static constexpr int kSlots = kKernel + kStride;                   // of the ring: kStride are being written
  static constexpr int kColumns = (kWidth - 1) * kStride + kKernel;  // of the input that a strip sees
  static constexpr int kBatch = 3;  // of the input that a thread forms at once
  static constexpr int kTaps = kKernel * kKernel, kSums = 3;
  static constexpr int kVectors = kTaps + 2;  // in shared memory: the taps; scale and shift of the input

  static __host__ __device__ int ring_columns(const Geometry& g) {
    return (g.strips * kWidth - 1) * kStride + kKernel;
  }
  static int shared_floats(const Geometry& g) {
    return g.vectors * kChannels * (kVectors + std::max(kSlots * ring_columns(g), g.strips * kSums));
  }
  static int columns(const Params& p) { return p.ow; }
  static int steps(const Params& p) { return p.oh; }
};

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, 3)
    forward_kernel(const __grid_constant__ Launch<TrainDepthwiseParams> launch) {
  using T = typename Tr::T;
  constexpr int kChannels = Tr::kChannels, kWidth = Tr::kWidth, kKernel = Tr::kKernel, kStride = Tr::kStride;
  using Channels = Vec<T, kChannels>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const TrainDepthwiseParams& p = launch.p;
  const Geometry& g = launch.g;
  const Tile tile(g);
  const int block_channels = g.vectors * kChannels;
  const int first_channel = tile.chunk * block_channels;
  const int channels = min(block_channels, p.c - first_channel);
  float* const vectors = reinterpret_cast<float*>(shared_memory);  // [kVectors][block_channels]
  float* const ring = vectors + Tr::kVectors * block_channels;     // [kSlots][ring columns][block_channels]

  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    const int c = first_channel + i;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * Tr::kTaps;
    for (int k = 0; k < Tr::kTaps; ++k) vectors[k * block_channels + i] = to_float(weight[k]);
    vectors[Tr::kTaps * block_channels + i] = p.x_norm == nullptr ? 1.0f : p.x_norm[c];
    vectors[(Tr::kTaps + 1) * block_channels + i] = p.x_norm == nullptr ? 0.0f : p.x_norm[int64_t{p.c} + c];
  }

  const int v = static_cast<int>(threadIdx.x) % g.vectors;
  const int strip = static_cast<int>(threadIdx.x) / g.vectors;
  const int channel = v * kChannels;
  const bool works = strip < g.strips && channel < channels;
  const auto vector = [&](int k, float (&out)[kChannels]) {
    load_floats(vectors + k * block_channels + channel, out);
  };
  const int tile_column = tile.tile_w * g.strips * kWidth;
  const int column = tile_column + strip * kWidth;
  const int columns = works ? min(kWidth, p.ow - column) : 0;  // of this thread; may be negative
  const int ring_columns = Tr::ring_columns(g);
  const int x_column = tile_column * kStride - p.window.left;  // the first in the ring
  const int slot_floats = ring_columns * block_channels;
  const int first_step = tile.tile_h * g.rows;
  const int end_step = min(first_step + g.rows, p.oh);
  const int64_t first_image = tile.group * g.images;
  const int64_t end_image = min(first_image + g.images, p.n);

  // Mean, relative to one of the values, and sum of squared deviations of the `count` values so far.
  int count = 0;
  float shift[kChannels] = {}, mean[kChannels] = {}, squares[kChannels] = {};
  for (int64_t n = first_image; n < end_image; ++n) {
    // Row `row` of the padded, activated input, into its place in the ring.
    const auto form = [&](int row) {
      if (!works) return;
      const int x_row = row - p.window.top;
      const bool there = x_row >= 0 && x_row < p.h;
      float* const to = ring + row % Tr::kSlots * slot_floats + channel;
      const T* const from = static_cast<const T*>(p.x);
      const int64_t map = ((n * p.h + x_row) * p.w + x_column) * p.c + first_channel + channel;
      for (int first = strip; first < ring_columns; first += Tr::kBatch * g.strips) {
        Channels loaded[Tr::kBatch];
        bool has[Tr::kBatch];
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          const int at = first + b * g.strips;
          has[b] = there && at < ring_columns && x_column + at >= 0 && x_column + at < p.w;
          loaded[b] = Channels::zero();
          if (has[b]) loaded[b] = Channels::load_constant(from + map + static_cast<int64_t>(at) * p.c);
        }
        float scale[kChannels], bias[kChannels], z[Tr::kBatch * kChannels];
        vector(Tr::kTaps, scale);
        vector(Tr::kTaps + 1, bias);
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          float x[kChannels];
          loaded[b].to_floats(x);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) z[b * kChannels + c] = fmaf(x[c], scale[c], bias[c]);
        }
        activate<!kIs16Bit<T>>(p.x_act, z);
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          const int at = first + b * g.strips;
          if (at >= ring_columns) continue;
          float a[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) a[c] = has[b] ? z[b * kChannels + c] : 0.0f;
          store_floats(to + at * block_channels, a);
        }
      }
    };

    __syncthreads();  // the vectors are there, and nobody reads the ring of the image before
    for (int row = 0; row < kKernel - kStride; ++row) form(first_step * kStride + row);
#pragma unroll 1
    for (int step = first_step; step < end_step; ++step) {
#pragma unroll 1
      for (int row = kKernel - kStride; row < kKernel; ++row) form(step * kStride + row);
      __syncthreads();
      if (columns <= 0) continue;
      float acc[kWidth][kChannels] = {};
#pragma unroll
      for (int kh = 0; kh < kKernel; ++kh) {
        const float* const from = ring + (step * kStride + kh) % Tr::kSlots * slot_floats +
                                  strip * kWidth * kStride * block_channels + channel;
        float a[Tr::kColumns][kChannels];
#pragma unroll
        for (int i = 0; i < Tr::kColumns; ++i) load_floats(from + i * block_channels, a[i]);
#pragma unroll
        for (int kw = 0; kw < kKernel; ++kw) {
          float tap[kChannels];
          vector(kh * kKernel + kw, tap);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) acc[i][c] = fmaf(a[i * kStride + kw][c], tap[c], acc[i][c]);
          }
        }
      }

      T* const to =
          static_cast<T*>(p.y) + ((n * p.oh + step) * p.ow + column) * p.c + first_channel + channel;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Channels rounded = Channels::from_floats(acc[i]);
        if (i < columns) rounded.store(to + static_cast<int64_t>(i) * p.c);
        rounded.to_floats(acc[i]);  // the statistics are those of the map as it is kept
      }
      if (p.statistics == nullptr) continue;
      // The row's own mean and squares, merged by the formula of Chan, Golub and LeVeque (Algorithms for
      // computing the sample variance, 1983).
      const float share = static_cast<float>(columns) / static_cast<float>(count + columns);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (count == 0) shift[c] = acc[0][c];
        float row_mean = 0, row_squares = 0;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          acc[i][c] -= shift[c];
          if (i < columns) row_mean += acc[i][c];
        }
        row_mean /= static_cast<float>(columns);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float off = acc[i][c] - row_mean;
          if (i < columns) row_squares = fmaf(off, off, row_squares);
        }
        const float delta = row_mean - mean[c];
        mean[c] = fmaf(delta, share, mean[c]);
        squares[c] += fmaf(delta * delta, static_cast<float>(count) * share, row_squares);
      }
      count += columns;
    }
  }
  if (p.statistics == nullptr) return;

  float* const strip_sums = ring;  // [strips][kSums][block_channels]
  __syncthreads();
  if (works) {
    float* const to = strip_sums + strip * Tr::kSums * block_channels + channel;
    store_floats(to, shift);
    store_floats(to + block_channels, mean);
    store_floats(to + 2 * block_channels, squares);
  }
  __syncthreads();
  // Over the block's strips in double, as their shifts differ. The first has at least as many values as any.
  float* const part = p.partial + tile.part * Tr::kSums * p.c + first_channel;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    const auto value = [&](int s, int k) {
      return static_cast<double>(strip_sums[(s * Tr::kSums + k) * block_channels + c]);
    };
    const auto weight = [&](int s) { return max(0, min(kWidth, p.ow - tile_column - s * kWidth)); };
    double sum = 0, total = 0;
    for (int s = 0; s < g.strips; ++s) {
      sum += weight(s) * (value(s, 0) - value(0, 0) + value(s, 1));
      total += weight(s);
    }
    const double block_mean = sum / total;  // relative to the shift of the first
    double block_squares = 0;
    const double lines = static_cast<double>((end_step - first_step) * (end_image - first_image));
    for (int s = 0; s < g.strips; ++s) {
      const double delta = value(s, 0) - value(0, 0) + value(s, 1) - block_mean;
      block_squares += value(s, 2) + delta * delta * lines * weight(s);
    }
    part[c] = static_cast<float>(value(0, 0));
    part[int64_t{p.c} + c] = static_cast<float>(block_mean);
    part[2 * int64_t{p.c} + c] = static_cast<float>(block_squares);
  }
}

// ---- sums over the blocks --------------------------------------------------------------------------------

constexpr int kReduceGroups = 8;  // threads to a column

// The sum over the threads of a column, in order, for all of them.
__device__ __forceinline__ double sum_of_groups(double (&sums)[kReduceGroups][32], int lane, int group,
                                                double own) {
  sums[group][lane] = own;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kReduceGroups; ++i) total += sums[i][lane];
  __syncthreads();
  return total;
}

// [2][C] mean and biased variance from `partial`, [parts][shift, mean, squares][C].
struct StatisticsParams {
  const float* partial;
  float* statistics;
  Geometry g;
  int width;  // columns of a tile
  int64_t n;
  int c, oh, ow;
};

__global__ void __launch_bounds__(32 * kReduceGroups)
    statistics_kernel(const __grid_constant__ StatisticsParams p) {
  __shared__ double sums[kReduceGroups][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  const int64_t parts = c < p.c ? p.g.parts() : 0;
  const auto value = [&](int64_t part, int k) {
    return static_cast<double>(p.partial[(part * 3 + k) * p.c + c]);
  };
  const auto weight = [&](int64_t part) {
    const int64_t tile_w = part % p.g.tiles_w, rest = part / p.g.tiles_w;
    const int64_t columns = min(int64_t{p.width}, p.ow - tile_w * p.width);
    const int64_t rows = min(int64_t{p.g.rows}, p.oh - rest % p.g.tiles_h * p.g.rows);
    return static_cast<double>(columns * rows *
                               min(int64_t{p.g.images}, p.n - rest / p.g.tiles_h * p.g.images));
  };
  const double total = static_cast<double>(p.n) * p.oh * p.ow;
  double own = 0;
  for (int64_t part = group; part < parts; part += kReduceGroups) {
    own += weight(part) * (value(part, 0) + value(part, 1));
  }
  const double mean = sum_of_groups(sums, lane, group, own) / total;
  own = 0;
  for (int64_t part = group; part < parts; part += kReduceGroups) {
    const double delta = value(part, 0) + value(part, 1) - mean;
    own += value(part, 2) + delta * delta * weight(part);
  }
  const double variance = sum_of_groups(sums, lane, group, own) / total;
  if (group > 0 || c >= p.c) return;
  p.statistics[c] = static_cast<float>(mean);
  p.statistics[p.c + c] = static_cast<float>(variance);
}

// Adds up the parts: a column of `partial`, [parts][kSums][C], to a thread and seven others.
struct ReduceParams {
  const float* partial;
  void* dweight;   // [C][taps]; may be null
  float* moments;  // [2][C]; may be null
  int64_t parts;
  int c, taps;
};

template <class T>
__global__ void __launch_bounds__(32 * kReduceGroups) reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ double sums[kReduceGroups][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  const int64_t columns = int64_t{p.taps + 2} * p.c;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  float total = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = group; part < p.parts; part += kReduceGroups) {
      total += p.partial[part * columns + column];
    }
  }
  total = static_cast<float>(sum_of_groups(sums, lane, group, total));
  if (group > 0 || column >= columns) return;
  const int k = static_cast<int>(column / p.c);
  const int64_t c = column % p.c;
  if (k >= p.taps) {
    if (p.moments != nullptr) p.moments[int64_t{k - p.taps} * p.c + c] = total;
  } else if (p.dweight != nullptr) {
    static_cast<T*>(p.dweight)[c * p.taps + k] = from_float<T>(total);
  }
}

// ---- launchers -------------------------------------------------------------------------------------------

// Blocks of at most kMaxThreads threads and kSharedBytes, 32 channels or more side by side. Long columns and
// many images to a block re-read fewer rows and leave fewer sums; but there are kEnoughBlocks, if there can
// be.
template <class Tr>
Geometry geometry_of(const typename Tr::Params& p) {
  Geometry g;
  const int vectors = ceil_div(p.c, Tr::kChannels);
  const int strips = ceil_div(Tr::columns(p), Tr::kWidth);
  g.tiles_w = ceil_div(strips, std::max(1, kMaxThreads / std::min(vectors, 32 / Tr::kChannels)));
  g.strips = ceil_div(strips, g.tiles_w);
  g.chunks = ceil_div(vectors, std::min(vectors, kMaxThreads / g.strips));
  g.vectors = ceil_div(vectors, g.chunks);
  while (Tr::shared_floats(g) * 4 > kSharedBytes && g.vectors > 1) {
    g.chunks = ceil_div(vectors, g.vectors - 1);
    g.vectors = ceil_div(vectors, g.chunks);
  }
  const int steps = Tr::steps(p);
  const int64_t across = int64_t{g.chunks} * g.tiles_w;
  g.rows = std::min(steps, 32);
  while (g.rows > 8 && across * ceil_div(steps, g.rows) * p.n < kEnoughBlocks) g.rows = ceil_div(g.rows, 2);
  g.tiles_h = ceil_div(steps, g.rows);
  const int64_t pixels = int64_t{g.rows} * Tr::kStride * g.strips * Tr::kWidth;
  while (g.images < p.n && g.images * pixels < 2048 &&
         across * g.tiles_h * ceil_div<int64_t>(p.n, 2 * g.images) >= kEnoughBlocks) {
    g.images *= 2;
  }
  g.groups = ceil_div<int64_t>(p.n, g.images);
  return g;
}

template <class Tr>
Status launch_typed(void (*kernel)(Launch<typename Tr::Params>), const typename Tr::Params& p,
                    cudaStream_t stream) {
  const Geometry g = geometry_of<Tr>(p);
  const int64_t blocks = g.parts() * g.chunks;
  if (blocks > INT32_MAX) return {cudaErrorInvalidValue, "x has too many elements for one launch"};
  const int threads = ceil_div(g.vectors * g.strips, 32) * 32;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, Tr::shared_floats(g) * 4, stream,
                Launch<typename Tr::Params>{p, g});
}

// Calls f(Traits()) with the traits of a problem, whose window has been checked.
template <template <class, int, int, int> class Traits, class Params, class F>
auto with_traits(const Params& p, bool aligned, F&& f) {
  const auto with_channels = [&](auto element, auto kernel, auto stride) {
    using T = decltype(element);
    constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
    constexpr int kChannels = Traits<T, kKernel, kStride, 1>::most_channels();
    if (aligned && p.c % kChannels == 0) return f(Traits<T, kKernel, kStride, kChannels>());
    return f(Traits<T, kKernel, kStride, 1>());
  };
  const auto with_stride = [&](auto element, auto kernel) {
    return p.window.stride_h == 1 ? with_channels(element, kernel, std::integral_constant<int, 1>())
                                  : with_channels(element, kernel, std::integral_constant<int, 2>());
  };
  const auto with_kernel = [&](auto element) {
    switch (p.window.kh) {
      case 3:
        return with_stride(element, std::integral_constant<int, 3>());
      case 5:
        return with_stride(element, std::integral_constant<int, 5>());
      default:
        return with_stride(element, std::integral_constant<int, 7>());
    }
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return with_kernel(float());
    case DType::kFloat16:
      return with_kernel(half());
    default:
      return with_kernel(bf16());
  }
}

template <class F>
auto with_traits(const TrainDepthwiseBackwardParams& p, F&& f) {
  const bool aligned =
      is_aligned(p.grad, 16) && is_aligned(p.raw, 16) && is_aligned(p.x, 16) && is_aligned(p.dx, 16);
  return with_traits<Backward>(p, aligned, std::forward<F>(f));
}

template <class F>
auto with_traits(const TrainDepthwiseParams& p, F&& f) {
  return with_traits<Forward>(p, is_aligned(p.x, 16) && is_aligned(p.y, 16), std::forward<F>(f));
}

Status check_window(const Window& window) {
  if (window.kh != window.kw || (window.kh != 3 && window.kh != 5 && window.kh != 7)) {
    return {cudaErrorInvalidValue, "weight must be 3x3, 5x5 or 7x7"};
  }
  if (window.stride_h != window.stride_w || (window.stride_h != 1 && window.stride_h != 2)) {
    return {cudaErrorInvalidValue, "stride must be 1 or 2, the same both ways"};
  }
  return {};
}

}  // namespace

int64_t train_depthwise_partial(const TrainDepthwiseParams& p) {
  if (!check_window(p.window).ok() || p.n == 0 || p.c == 0 || p.oh == 0 || p.ow == 0) return 0;
  return with_traits(p, [&](auto traits) {
    using Tr = decltype(traits);
    return geometry_of<Tr>(p).parts() * Tr::kSums * p.c;
  });
}

Status launch_train_depthwise(const TrainDepthwiseParams& p, cudaStream_t stream) {
  const Status status = check_window(p.window);
  if (!status.ok() || p.n == 0 || p.c == 0 || p.oh == 0 || p.ow == 0) return status;
  StatisticsParams s{p.partial, p.statistics, {}, 0, p.n, p.c, p.oh, p.ow};
  const Status launched = with_traits(p, [&](auto traits) {
    using Tr = decltype(traits);
    s.g = geometry_of<Tr>(p);
    s.width = s.g.strips * Tr::kWidth;
    return launch_typed<Tr>(forward_kernel<Tr>, p, stream);
  });
  if (!launched.ok() || p.statistics == nullptr) return launched;
  return launch(statistics_kernel, dim3(static_cast<unsigned>(ceil_div(p.c, 32))), 32 * kReduceGroups, 0,
                stream, s);
}

int64_t train_depthwise_backward_partial(const TrainDepthwiseBackwardParams& p) {
  if (!check_window(p.window).ok() || p.n == 0 || p.c == 0 || p.h == 0 || p.w == 0) return 0;
  return with_traits(p, [&](auto traits) {
    using Tr = decltype(traits);
    return geometry_of<Tr>(p).parts() * Tr::kSums * p.c;
  });
}

Status launch_train_depthwise_backward(const TrainDepthwiseBackwardParams& p, cudaStream_t stream) {
  const Status status = check_window(p.window);
  if (!status.ok() || p.c == 0) return status;
  int64_t parts = 0;
  if (p.n > 0 && p.h > 0 && p.w > 0) {
    const Status launched = with_traits(p, [&](auto traits) {
      using Tr = decltype(traits);
      parts = geometry_of<Tr>(p).parts();
      return launch_typed<Tr>(backward_kernel<Tr>, p, stream);
    });
    if (!launched.ok()) return launched;
  }
  const int taps = p.window.kh * p.window.kw;
  const ReduceParams reduce{p.partial, p.dweight, p.moments, parts, p.c, taps};
  const int64_t blocks = ceil_div<int64_t>(int64_t{taps + 2} * p.c, 32);
  if (blocks > INT32_MAX) return {cudaErrorInvalidValue, "x has too many channels for one launch"};
  return with_dtype(p.dtype, [&](auto element) {
    return launch(reduce_kernel<decltype(element)>, dim3(static_cast<unsigned>(blocks)), 32 * kReduceGroups,
                  0, stream, reduce);
  });
}

}  // namespace effnet::cuda
