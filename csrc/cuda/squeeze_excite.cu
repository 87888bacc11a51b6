// Squeeze-and-excitation: the gate from sums over tiles, and the passes of its stand-alone form.
//
// gate_kernel   both layers of one image in one block, 2 C R weights from the L2: 221 KB in B0's widest block
//               at 16 bit, as 16 bytes a lane where rows allow it. With few images several blocks each
//               compute all hidden units and a part of the gate.
// pool_kernel   x [N, P, C] -> sums [N, tiles, C]. One read of x; 16 bytes a thread and load.
// scale_kernel  y = x * gate. One read and one write; the read comes from the L2 for as many images as fit
//               there.
// mean_kernel   sums [N, tiles, C] -> means [N, C].
//
// Every sum has a fixed order that depends on the shape alone.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"

namespace effnet::cuda {
namespace {

// ---- gate ------------------------------------------------------------------------------------------------

constexpr int kGateThreads = 512;

// Elements before the hidden units in shared memory: whole vectors.
__host__ __device__ constexpr int64_t hidden_at(int groups, int channels) {
  return ceil_div(int64_t{groups} * channels, int64_t{8}) * 8;
}

struct GateArgs {
  GateParams p;
  int groups;  // of threads that share the tiles of a channel
};

// sums[k] += the products of kCount elements of row k of the weights, from i on, and of v, in shared memory.
// kWhole: rows are made of aligned vectors of so many.
template <int kCount, bool kWhole, int kRows, class W>
__device__ __forceinline__ void add_products(float (&sums)[kRows], const W* const (&rows)[kRows],
                                             const float* v, int i) {
  float in[kCount];
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(v + i + j);
      in[j] = four.x, in[j + 1] = four.y, in[j + 2] = four.z, in[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) in[j] = v[i + j];
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    float weights[kCount];
    if constexpr (kWhole) {
      Vec<W, kCount>::load_constant(rows[k] + i).to_floats(weights);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) weights[j] = to_float(rows[k][i + j]);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[k] = fmaf(weights[j], in[j], sums[k]);
  }
}

// Calls f(length, whole), the longest vectors that rows of `count` elements are made of, and whether they lie
// at multiples of it in memory. The order of sums follows from the length, and so from the shape alone.
template <class W, class F>
__device__ __forceinline__ void with_vectors(const W* w, int count, F f) {
  const auto with_length = [&](auto length) {
    constexpr int kCount = decltype(length)::value;
    if (reinterpret_cast<uintptr_t>(w) % (kCount * sizeof(W)) == 0) return f(length, std::true_type());
    f(length, std::false_type());
  };
  if (count % kVector<W> == 0) return with_length(std::integral_constant<int, kVector<W>>());
  if (sizeof(W) == 2 && count % 4 == 0) return with_length(std::integral_constant<int, 4>());
  if (count % 2 == 0) return with_length(std::integral_constant<int, 2>());
  with_length(std::integral_constant<int, 1>());
}

// hidden[r] = act(bias[r] + sum over c of w[r][c] mean[c]): a warp for each r, and four at once.
template <class T, class W>
__device__ __forceinline__ void reduce_layer(float* hidden, const W* w, const SqueezeExciteWeights& se,
                                             const float* mean, int channels) {
  constexpr int kRows = 4, kWarps = kGateThreads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  with_vectors(w, channels, [&](auto length, auto whole) {
    constexpr int kCount = decltype(length)::value;
    for (int first = warp * kRows; first < se.reduced; first += kWarps * kRows) {
      float sums[kRows] = {};
      const W* rows[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) rows[k] = w + int64_t{min(first + k, se.reduced - 1)} * channels;
#pragma unroll 2
      for (int c = lane * kCount; c < channels; c += 32 * kCount)
        add_products<kCount, decltype(whole)::value>(sums, rows, mean, c);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        for (int offset = 16; offset > 0; offset /= 2)
          sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], offset);
        if (lane == 0 && first + k < se.reduced)
          hidden[first + k] = activate<true>(se.act, sums[k] + load_param<T>(se.b_reduce, first + k));
      }
    }
  });
}

// gate[c] = act(bias[c] + sum over r of w[c][r] hidden[r]) for c in [first, last): a thread for each.
template <class T, class W>
__device__ __forceinline__ void expand_layer(float* gate, const W* w, const SqueezeExciteWeights& se,
                                             const float* hidden, int first, int last) {
  with_vectors(w, se.reduced, [&](auto length, auto whole) {
    constexpr int kCount = decltype(length)::value;
    for (int c = first + static_cast<int>(threadIdx.x); c < last; c += kGateThreads) {
      float sum[1] = {};
      const W* const row[1] = {w + int64_t{c} * se.reduced};
#pragma unroll 8
      for (int r = 0; r < se.reduced; r += kCount)
        add_products<kCount, decltype(whole)::value>(sum, row, hidden, r);
      gate[c] = activate<true>(se.gate, sum[0] + load_param<T>(se.b_expand, c));
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kGateThreads, 1) gate_kernel(const __grid_constant__ GateArgs args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const GateParams& p = args.p;
  const SqueezeExciteWeights& se = p.se;
  float* mean = reinterpret_cast<float*>(shared_memory);  // [groups][C], then [C]
  float* hidden = mean + hidden_at(args.groups, p.c);     // [R]
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t n = blockIdx.x;
  const float* const sums = p.sums + n * p.tiles * p.c;

  const int group_threads = args.groups > 1 ? p.c : kGateThreads;
  const int group = thread / group_threads;
  if (group < args.groups) {
    for (int c = thread % group_threads; c < p.c; c += group_threads) {
      float sum = 0;
#pragma unroll 8
      for (int tile = group; tile < p.tiles; tile += args.groups)
        sum += sums[static_cast<int64_t>(tile) * p.c + c];
      mean[group * p.c + c] = sum;
    }
  }
  __syncthreads();
  for (int c = thread; c < p.c; c += kGateThreads) {
    float sum = mean[c];
    for (int i = 1; i < args.groups; ++i) sum += mean[i * p.c + c];
    mean[c] = sum / static_cast<float>(p.pixels);
  }
  __syncthreads();

  if (se.w_reduce.is_fp32) {
    reduce_layer<T>(hidden, static_cast<const float*>(se.w_reduce.data), se, mean, p.c);
  } else {
    reduce_layer<T>(hidden, static_cast<const T*>(se.w_reduce.data), se, mean, p.c);
  }
  __syncthreads();

  // This block's part of the gate.
  const int part = ceil_div(p.c, static_cast<int>(gridDim.y));
  const int first = static_cast<int>(blockIdx.y) * part, last = min(first + part, p.c);
  float* const gate = p.gate + n * p.c;
  if (se.w_expand.is_fp32) {
    expand_layer<T>(gate, static_cast<const float*>(se.w_expand.data), se, hidden, first, last);
  } else {
    expand_layer<T>(gate, static_cast<const T*>(se.w_expand.data), se, hidden, first, last);
  }
}

// ---- pool, scale, mean -----------------------------------------------------------------------------------

constexpr int kLanes = 16;        // threads of a block that share its channels and divide its pixels
constexpr int kMaxVectors = 16;   // threads side by side, each for its own channels
constexpr int kTilePixels = 256;  // that one partial sum covers

struct MapArgs {
  const void* x;
  const float* gate;
  void* y;
  float* sums;
  int64_t pixels;
  int c, tiles;
  int vectors;  // of kChannels channels, in a block
  int chunks;   // blocks side by side that cover all channels
};

template <class T, int kChannels, bool kPool>
__global__ void __launch_bounds__(kMaxVectors* kLanes) map_kernel(const __grid_constant__ MapArgs p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int block_channels = p.vectors * kChannels;
  const int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.chunks));
  const int64_t tile = blockIdx.x / static_cast<unsigned>(p.chunks);  // over all images
  const int64_t n = tile / p.tiles;
  const int64_t first = tile % p.tiles * kTilePixels;
  const int count = static_cast<int>(min(p.pixels - first, int64_t{kTilePixels}));
  const int lane = static_cast<int>(threadIdx.x) / p.vectors;
  const int in_block = static_cast<int>(threadIdx.x) % p.vectors * kChannels;
  const int channel = chunk * block_channels + in_block;
  const bool works = channel < p.c;
  const int64_t base = (n * p.pixels + first) * p.c + channel;
  const T* const x = static_cast<const T*>(p.x) + base;

  if constexpr (kPool) {
    float* const partial = reinterpret_cast<float*>(shared_memory);  // [kLanes][block_channels]
    float total[kChannels] = {};
    if (works) {
#pragma unroll 4
      for (int i = lane; i < count; i += kLanes) {
        float value[kChannels];
        Vec<T, kChannels>::load_constant(x + static_cast<int64_t>(i) * p.c).to_floats(value);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) total[c] += value[c];
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) partial[lane * block_channels + in_block + c] = total[c];
    }
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < block_channels; c += static_cast<int>(blockDim.x)) {
      if (chunk * block_channels + c >= p.c) continue;
      float sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += partial[i * block_channels + c];
      p.sums[tile * p.c + chunk * block_channels + c] = sum;
    }
  } else if (works) {
    float gate[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) gate[c] = p.gate[n * p.c + channel + c];
    T* const y = static_cast<T*>(p.y) + base;
#pragma unroll 4
    for (int i = lane; i < count; i += kLanes) {
      float value[kChannels];
      Vec<T, kChannels>::load_constant(x + static_cast<int64_t>(i) * p.c).to_floats(value);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) value[c] *= gate[c];
      Vec<T, kChannels>::from_floats(value).store(y + static_cast<int64_t>(i) * p.c);
    }
  }
}

template <class T, int kChannels, bool kPool>
Status launch_map(MapArgs p, int64_t n, cudaStream_t stream) {
  const int vectors = ceil_div(p.c, kChannels);
  p.chunks = ceil_div(vectors, kMaxVectors);
  p.vectors = ceil_div(vectors, p.chunks);
  const int shared_bytes = kPool ? p.vectors * kLanes * kChannels * 4 : 0;
  return launch<map_kernel<T, kChannels, kPool>>(n * p.tiles * p.chunks, p.vectors * kLanes, shared_bytes,
                                                 stream, p);
}

// Lanes add up in the same order whether or not channels go in vectors: the bits depend on the shape alone.
template <bool kPool>
Status launch_map(DType dtype, MapArgs p, int64_t n, cudaStream_t stream) {
  if (n == 0 || p.pixels == 0 || p.c == 0) return {};
  p.tiles = static_cast<int>(ceil_div(p.pixels, int64_t{kTilePixels}));
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (p.c % kVector<T> == 0 && is_aligned(p.x, 16) && is_aligned(p.y, 16)) {
      return launch_map<T, kVector<T>, kPool>(p, n, stream);
    }
    return launch_map<T, 1, kPool>(p, n, stream);
  });
}

constexpr int kMeanThreads = 256;

__global__ void __launch_bounds__(kMeanThreads) mean_kernel(const __grid_constant__ MeanParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMeanThreads + threadIdx.x;
  if (i >= p.n * p.c) return;
  const float* const sums = p.sums + i / p.c * p.tiles * p.c + i % p.c;
  float sum = 0;
#pragma unroll 8
  for (int tile = 0; tile < p.tiles; ++tile) sum += sums[static_cast<int64_t>(tile) * p.c];
  p.mean[i] = sum / static_cast<float>(p.pixels);
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------

Status launch_squeeze_excite_gate(const GateParams& p, cudaStream_t stream) {
  if (p.n == 0 || p.c == 0) return {};
  if (p.n > INT32_MAX) return {cudaErrorInvalidValue, "mean has too many rows for one launch"};
  GateArgs args{p, std::max(1, std::min(p.tiles, kGateThreads / p.c))};
  const int64_t shared_bytes = (hidden_at(args.groups, p.c) + p.se.reduced) * 4;
  if (shared_bytes > 96 * 1024) return {cudaErrorInvalidValue, "se has more channels than fit shared memory"};
  const int parts = p.n >= 64 ? 1 : std::min(8, ceil_div(p.c, kGateThreads / 8));
  const dim3 grid(static_cast<unsigned>(p.n), static_cast<unsigned>(parts));
  return with_type(p.dtype, [&](auto element) {
    return launch<gate_kernel<decltype(element)>>(grid, kGateThreads, static_cast<int>(shared_bytes), stream,
                                                  args);
  });
}

int pool_tiles(const PoolParams& p) { return static_cast<int>(ceil_div(p.pixels, int64_t{kTilePixels})); }

Status launch_pool(const PoolParams& p, cudaStream_t stream) {
  return launch_map<true>(p.dtype, MapArgs{p.x, nullptr, nullptr, p.sums, p.pixels, p.c, 0, 0, 0}, p.n,
                          stream);
}

Status launch_scale(const ScaleParams& p, cudaStream_t stream) {
  return launch_map<false>(p.dtype, MapArgs{p.x, p.gate, p.y, nullptr, p.pixels, p.c, 0, 0, 0}, p.n, stream);
}

Status launch_mean(const MeanParams& p, cudaStream_t stream) {
  return launch<mean_kernel>(ceil_div(p.n * p.c, int64_t{kMeanThreads}), kMeanThreads, 0, stream, p);
}

}  // namespace effnet::cuda
