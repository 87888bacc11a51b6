// The depthwise convolution in training over [N, H, W, C], forward: behind the BatchNorm and activation of
// the layer above, with the statistics of its output. The rows in the ring are activated input; a thread
// gathers its outputs from them.
#include "cuda/train_depthwise.cuh"

namespace effnet::cuda {
namespace {

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
  static int columns(const Params& p) { return p.ow; }
  static int steps(const Params& p) { return p.oh; }
};

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, 3)
    forward_kernel(const __grid_constant__ Args<TrainDepthwiseParams> args) {
  using T = typename Tr::T;
  constexpr int kChannels = Tr::kChannels, kWidth = Tr::kWidth, kKernel = Tr::kKernel, kStride = Tr::kStride;
  using Channels = Vec<T, kChannels>;
  const TrainDepthwiseParams& p = args.p;
  const Geometry& g = args.g;
  const Tile<Tr> t(g, p);
  t.for_each_channel([&](int i, int c) {
    t.put_taps(p.weight, i, c);
    t.put(Tr::kTaps, i, p.x_norm == nullptr ? 1.0f : p.x_norm[c]);
    t.put(Tr::kTaps + 1, i, p.x_norm == nullptr ? 0.0f : p.x_norm[int64_t{p.c} + c]);
  });

  const int tile_column = t.tile_w * g.strips * kWidth;
  const int column = tile_column + t.strip * kWidth;
  const int columns = t.works ? min(kWidth, p.ow - column) : 0;  // of this thread; may be negative
  const int ring_columns = Tr::ring_columns(g);
  const int x_column = tile_column * kStride - p.window.left;  // the first in the ring
  const int slot_floats = ring_columns * t.block_channels;
  const int first_step = t.tile_h * g.rows;
  const int end_step = min(first_step + g.rows, p.oh);

  // Mean, relative to one of the values, and sum of squared deviations of the `count` values so far.
  int count = 0;
  float shift[kChannels] = {}, mean[kChannels] = {}, squares[kChannels] = {};
  for (int64_t n = t.first_image; n < t.end_image; ++n) {
    // Row `row` of the padded, activated input, into its place in the ring.
    const auto form = [&](int row) {
      if (!t.works) return;
      const int x_row = row - p.window.top;
      const bool there = x_row >= 0 && x_row < p.h;
      float* const to = t.ring + row % Tr::kSlots * slot_floats + t.channel;
      const T* const from = static_cast<const T*>(p.x);
      const int64_t map = ((n * p.h + x_row) * p.w + x_column) * p.c + t.first_channel + t.channel;
      for (int first = t.strip; first < ring_columns; first += Tr::kBatch * g.strips) {
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
        t.vector(Tr::kTaps, scale);
        t.vector(Tr::kTaps + 1, bias);
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
          store_floats(to + at * t.block_channels, a);
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
        const float* const from = t.ring + (step * kStride + kh) % Tr::kSlots * slot_floats +
                                  t.strip * kWidth * kStride * t.block_channels + t.channel;
        float a[Tr::kColumns][kChannels];
#pragma unroll
        for (int i = 0; i < Tr::kColumns; ++i) load_floats(from + i * t.block_channels, a[i]);
#pragma unroll
        for (int kw = 0; kw < kKernel; ++kw) {
          float tap[kChannels];
          t.vector(kh * kKernel + kw, tap);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) acc[i][c] = fmaf(a[i * kStride + kw][c], tap[c], acc[i][c]);
          }
        }
      }

      T* const to =
          static_cast<T*>(p.y) + ((n * p.oh + step) * p.ow + column) * p.c + t.first_channel + t.channel;
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

  float* const strip_sums = t.ring;  // [strips][kSums][block_channels]
  __syncthreads();
  if (t.works) {
    float* const to = strip_sums + t.strip * Tr::kSums * t.block_channels + t.channel;
    store_floats(to, shift);
    store_floats(to + t.block_channels, mean);
    store_floats(to + 2 * t.block_channels, squares);
  }
  __syncthreads();
  // Over the block's strips in double, as their shifts differ. The first has at least as many values as any.
  float* const part = p.partial + t.part * Tr::kSums * p.c + t.first_channel;
  t.for_each_channel([&](int c, int) {
    const auto value = [&](int s, int k) {
      return static_cast<double>(strip_sums[(s * Tr::kSums + k) * t.block_channels + c]);
    };
    const auto weight = [&](int s) { return max(0, min(kWidth, p.ow - tile_column - s * kWidth)); };
    double sum = 0, total = 0;
    for (int s = 0; s < g.strips; ++s) {
      sum += weight(s) * (value(s, 0) - value(0, 0) + value(s, 1));
      total += weight(s);
    }
    const double block_mean = sum / total;  // relative to the shift of the first
    double block_squares = 0;
    const double lines = static_cast<double>((end_step - first_step) * (t.end_image - t.first_image));
    for (int s = 0; s < g.strips; ++s) {
      const double delta = value(s, 0) - value(0, 0) + value(s, 1) - block_mean;
      block_squares += value(s, 2) + delta * delta * lines * weight(s);
    }
    part[c] = static_cast<float>(value(0, 0));
    part[int64_t{p.c} + c] = static_cast<float>(block_mean);
    part[2 * int64_t{p.c} + c] = static_cast<float>(block_squares);
  });
}

// ---- statistics ------------------------------------------------------------------------------------------

// [2][C] mean and biased variance from `partial`, [parts][shift, mean, squares][C].
struct StatisticsParams {
  const float* partial;
  float* statistics;
  Geometry g;
  int width;  // columns of a tile
  int64_t n;
  int c, oh, ow;
};

// How many pixels a part has, of part after part, kReduceGroups apart: counted on without a division.
struct PartPixels {
  const StatisticsParams& p;
  int tile_w, tile_h, step_w, step_h;
  int64_t images, step_images;

  __device__ __forceinline__ PartPixels(const StatisticsParams& p_, int part) : p(p_) {
    split(part, tile_w, tile_h, images);
    split(kReduceGroups, step_w, step_h, step_images);
  }

  __device__ __forceinline__ void split(int part, int& w, int& h, int64_t& of_images) const {
    w = part % p.g.tiles_w;
    h = part / p.g.tiles_w % p.g.tiles_h;
    of_images = part / p.g.tiles_w / p.g.tiles_h;
  }

  __device__ __forceinline__ double next() {
    const int columns = min(p.width, p.ow - tile_w * p.width);
    const int rows = min(p.g.rows, p.oh - tile_h * p.g.rows);
    const int64_t count = min(int64_t{p.g.images}, p.n - images * p.g.images);
    tile_w += step_w;
    const bool over_w = tile_w >= p.g.tiles_w;
    tile_w -= over_w ? p.g.tiles_w : 0;
    tile_h += step_h + over_w;
    const bool over_h = tile_h >= p.g.tiles_h;
    tile_h -= over_h ? p.g.tiles_h : 0;
    images += step_images + over_h;
    return static_cast<double>(count * columns * rows);
  }
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
  const double total = static_cast<double>(p.n) * p.oh * p.ow;
  double own = 0;
  PartPixels pixels(p, group);
#pragma unroll 4
  for (int64_t part = group; part < parts; part += kReduceGroups)
    own += pixels.next() * (value(part, 0) + value(part, 1));
  const double mean = sum_of_groups(sums, lane, group, own) / total;
  own = 0;
  PartPixels again(p, group);
#pragma unroll 4
  for (int64_t part = group; part < parts; part += kReduceGroups) {
    const double delta = value(part, 0) + value(part, 1) - mean;
    own += value(part, 2) + delta * delta * again.next();
  }
  const double variance = sum_of_groups(sums, lane, group, own) / total;
  if (group > 0 || c >= p.c) return;
  p.statistics[c] = static_cast<float>(mean);
  p.statistics[p.c + c] = static_cast<float>(variance);
}

// ---- launcher --------------------------------------------------------------------------------------------

template <class F>
auto with_traits(const TrainDepthwiseParams& p, F&& f) {
  return with_traits<Forward>(p, is_aligned(p.x, 16) && is_aligned(p.y, 16), std::forward<F>(f));
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
  StatisticsParams sums{p.partial, p.statistics, {}, 0, p.n, p.c, p.oh, p.ow};
  const Status launched = with_traits(p, [&](auto traits) {
    using Tr = decltype(traits);
    sums.g = geometry_of<Tr>(p);
    sums.width = sums.g.strips * Tr::kWidth;
    return launch_typed<Tr, forward_kernel<Tr>>(p, stream);
  });
  if (!launched.ok() || p.statistics == nullptr) return launched;
  return launch<statistics_kernel>(ceil_div(p.c, 32), 32 * kReduceGroups, 0, stream, sums);
}

}  // namespace effnet::cuda
