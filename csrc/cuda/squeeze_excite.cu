// Squeeze-and-excitation: the gate from sums over tiles, and the passes of its stand-alone form.
//
// gate_kernel      both layers of one image in one block, 2 C R weights from the L2: 110 KB in B0's widest
// block at 16 bit.
//                  With few images several blocks each compute all hidden units and a part of the gate.
// pool_kernel      x [N, P, C] -> sums [N, tiles, C]. One read of x; 16 bytes a thread and load.
// scale_kernel     y = x * gate. One read and one write; the read comes from the L2 for as many images as fit
// there. mean_kernel      sums [N, tiles, C] -> means [N, C].
//
// Every sum has a fixed order that depends on the shape alone.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"

namespace effnet::cuda {
namespace {

// ---- gate ------------------------------------------------------------------------------------------------

constexpr int kGateThreads = 512;

struct GateLaunch {
  GateParams p;
  int groups;  // of threads that share the tiles of a channel
};

// The sum of w[i] * v[i] over lanes that each take every `lanes`-th i, in every one of them.
template <class W>
__device__ __forceinline__ float dot(const W* w, const float* v, int count, int lane, int lanes) {
  float sum = 0;
#pragma unroll 8
  for (int i = lane; i < count; i += lanes) sum = fmaf(to_float(w[i]), v[i], sum);
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// out[o] = act(bias[o] + sum over i of w[o][i] in[i]) for o in [first, last). `lanes` lanes compute one
// output; a power of two. All threads of the block take part.
template <class T, class W, class Store>
__device__ __forceinline__ void layer(const W* w, const Param& bias, int act, const float* in, int inputs,
                                      int first, int last, int lanes, Store store) {
  const int thread = static_cast<int>(threadIdx.x);
  const int at_once = kGateThreads / lanes;
  for (int block = first; block < last; block += at_once) {
    const int o = block + thread / lanes;
    const int64_t row = min(o, last - 1);  // shuffles need every lane
    const float sum = dot(w + row * inputs, in, inputs, thread % lanes, lanes);
    if (o < last && thread % lanes == 0) store(o, activate<true>(act, sum + load_param<T>(bias, o)));
  }
}

template <class T>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(const __grid_constant__ GateLaunch launch) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const GateParams& p = launch.p;
  const SqueezeExcite& se = p.se;
  float* mean = reinterpret_cast<float*>(shared_memory);  // [groups][C], then [C]
  float* hidden = mean + launch.groups * p.c;             // [R]
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t n = blockIdx.x;
  const float* const sums = p.sums + n * p.tiles * p.c;

  const int group_threads = launch.groups > 1 ? p.c : kGateThreads;
  const int group = thread / group_threads;
  if (group < launch.groups) {
    for (int c = thread % group_threads; c < p.c; c += group_threads) {
      float sum = 0;
#pragma unroll 8
      for (int tile = group; tile < p.tiles; tile += launch.groups)
        sum += sums[static_cast<int64_t>(tile) * p.c + c];
      mean[group * p.c + c] = sum;
    }
  }
  __syncthreads();
  for (int c = thread; c < p.c; c += kGateThreads) {
    float sum = mean[c];
    for (int i = 1; i < launch.groups; ++i) sum += mean[i * p.c + c];
    mean[c] = sum / static_cast<float>(p.pixels);
  }
  __syncthreads();

  const auto reduce = [&](auto* w) {
    layer<T>(w, se.b_reduce, se.act, mean, p.c, 0, se.reduced, 32, [&](int r, float y) { hidden[r] = y; });
  };
  if (se.w_reduce.is_fp32) {
    reduce(static_cast<const float*>(se.w_reduce.data));
  } else {
    reduce(static_cast<const T*>(se.w_reduce.data));
  }
  __syncthreads();

  // This block's part of the gate.
  const int part = ceil_div(p.c, static_cast<int>(gridDim.y));
  const int first = static_cast<int>(blockIdx.y) * part;
  float* const gate = p.gate + n * p.c;
  const auto expand = [&](auto* w) {
    layer<T>(w, se.b_expand, se.gate, hidden, se.reduced, first, min(first + part, p.c), 8,
             [&](int c, float y) { gate[c] = y; });
  };
  if (se.w_expand.is_fp32) {
    expand(static_cast<const float*>(se.w_expand.data));
  } else {
    expand(static_cast<const T*>(se.w_expand.data));
  }
}

// ---- pool, scale, mean -----------------------------------------------------------------------------------

constexpr int kLanes = 16;        // threads of a block that share its channels and divide its pixels
constexpr int kMaxVectors = 16;   // threads side by side, each for its own channels
constexpr int kTilePixels = 256;  // that one partial sum covers

struct MapLaunch {
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
__global__ void __launch_bounds__(kMaxVectors* kLanes) map_kernel(const __grid_constant__ MapLaunch p) {
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
Status launch_map(MapLaunch p, int64_t n, cudaStream_t stream) {
  const int vectors = ceil_div(p.c, kChannels);
  p.chunks = ceil_div(vectors, kMaxVectors);
  p.vectors = ceil_div(vectors, p.chunks);
  const int shared_bytes = kPool ? p.vectors * kLanes * kChannels * 4 : 0;
  return launch<map_kernel<T, kChannels, kPool>>(n * p.tiles * p.chunks, p.vectors * kLanes, shared_bytes,
                                                 stream, p);
}

// Lanes add up in the same order whether or not channels go in vectors: the bits depend on the shape alone.
template <bool kPool>
Status launch_map(DType dtype, MapLaunch p, int64_t n, cudaStream_t stream) {
  if (n == 0 || p.pixels == 0 || p.c == 0) return {};
  p.tiles = static_cast<int>(ceil_div(p.pixels, int64_t{kTilePixels}));
  return with_dtype(dtype, [&](auto element) {
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
  GateLaunch launch_params{p, std::max(1, std::min(p.tiles, kGateThreads / p.c))};
  const int64_t shared_bytes = (static_cast<int64_t>(launch_params.groups) * p.c + p.se.reduced) * 4;
  if (shared_bytes > 96 * 1024) return {cudaErrorInvalidValue, "se has more channels than fit shared memory"};
  const int parts = p.n >= 64 ? 1 : std::min(8, ceil_div(p.c, kGateThreads / 8));
  const dim3 grid(static_cast<unsigned>(p.n), static_cast<unsigned>(parts));
  return with_dtype(p.dtype, [&](auto element) {
    return launch<gate_kernel<decltype(element)>>(grid, kGateThreads, static_cast<int>(shared_bytes), stream,
                                                  launch_params);
  });
}

int pool_tiles(const PoolParams& p) { return static_cast<int>(ceil_div(p.pixels, int64_t{kTilePixels})); }

Status launch_pool(const PoolParams& p, cudaStream_t stream) {
  return launch_map<true>(p.dtype, MapLaunch{p.x, nullptr, nullptr, p.sums, p.pixels, p.c, 0, 0, 0}, p.n,
                          stream);
}

Status launch_scale(const ScaleParams& p, cudaStream_t stream) {
  return launch_map<false>(p.dtype, MapLaunch{p.x, p.gate, p.y, nullptr, p.pixels, p.c, 0, 0, 0}, p.n,
                           stream);
}

Status launch_mean(const MeanParams& p, cudaStream_t stream) {
  return launch<mean_kernel>(ceil_div(p.n * p.c, int64_t{kMeanThreads}), kMeanThreads, 0, stream, p);
}

}  // namespace effnet::cuda
