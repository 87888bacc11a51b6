// What the depthwise convolution in training shares both ways: how a map is cut into blocks and threads, and
// the sums over the blocks.
//
// A block takes some channels and a tile of the map, and goes down it with a ring of fp32 rows in shared
// memory, into which its threads put each element once (halo apart). A thread has a strip of kWidth columns
// of kChannels channels. Sums over pixels are taken per thread, then per block over its strips, then over the
// blocks by a second small kernel, always in an order that follows from the shape.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

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
struct Args {
  Params p;
  Geometry g;
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

// What a block works on, and a thread in it. In shared memory are Tr::kVectors vectors of the block's
// channels, the taps first, and the ring.
template <class Tr>
struct Tile {
  static constexpr int kChannels = Tr::kChannels;

  int tile_w, tile_h;
  int64_t first_image, end_image;
  int64_t part;  // where the block's sums go
  int block_channels, first_channel, channels;
  int strip, channel;  // of the thread
  bool works;          // its channels and strip are in the block
  float* vectors;      // [kVectors][block_channels]
  float* ring;         // [kSlots][ring columns][block_channels]

  __device__ __forceinline__ Tile(const Geometry& g, const typename Tr::Params& p) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    unsigned block = blockIdx.x;
    const int chunk = static_cast<int>(block % static_cast<unsigned>(g.chunks));
    block /= static_cast<unsigned>(g.chunks);
    part = block;
    tile_w = static_cast<int>(block % static_cast<unsigned>(g.tiles_w));
    block /= static_cast<unsigned>(g.tiles_w);
    tile_h = static_cast<int>(block % static_cast<unsigned>(g.tiles_h));
    first_image = int64_t{block / static_cast<unsigned>(g.tiles_h)} * g.images;
    end_image = min(first_image + g.images, p.n);
    block_channels = g.vectors * kChannels;
    first_channel = chunk * block_channels;
    channels = min(block_channels, p.c - first_channel);
    strip = static_cast<int>(threadIdx.x) / g.vectors;
    channel = static_cast<int>(threadIdx.x) % g.vectors * kChannels;
    works = strip < g.strips && channel < channels;
    vectors = reinterpret_cast<float*>(shared_memory);
    ring = vectors + Tr::kVectors * block_channels;
  }

  // Calls f(i, c) for every channel of the block, i in the block and c in the map.
  template <class F>
  __device__ __forceinline__ void for_each_channel(F f) const {
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
      f(i, first_channel + i);
    }
  }

  // Vector k of channel i of the block.
  __device__ __forceinline__ void put(int k, int i, float value) const {
    vectors[k * block_channels + i] = value;
  }

  // The taps of channel i of the block, c of the map.
  __device__ __forceinline__ void put_taps(const void* weight, int i, int c) const {
    using T = typename Tr::T;
    const T* from = static_cast<const T*>(weight) + static_cast<int64_t>(c) * Tr::kTaps;
    for (int k = 0; k < Tr::kTaps; ++k) put(k, i, to_float(from[k]));
  }

  // The thread's channels of vector k.
  __device__ __forceinline__ void vector(int k, float (&out)[kChannels]) const {
    load_floats(vectors + k * block_channels + channel, out);
  }
};

// ---- sums over the blocks --------------------------------------------------------------------------------

constexpr int kReduceGroups = 16;  // threads to a column

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

// ---- launchers -------------------------------------------------------------------------------------------

// Of a block: the vectors, and the ring, whose place the sums over strips take at the end.
template <class Tr>
int shared_bytes(const Geometry& g) {
  const int floats = Tr::kVectors + std::max(Tr::kSlots * Tr::ring_columns(g), g.strips * Tr::kSums);
  return g.vectors * Tr::kChannels * floats * static_cast<int>(sizeof(float));
}

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
  while (shared_bytes<Tr>(g) > kSharedBytes && g.vectors > 1) {
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

template <class Tr, auto kKernel>
Status launch_typed(const typename Tr::Params& p, cudaStream_t stream) {
  const Geometry g = geometry_of<Tr>(p);
  const int threads = ceil_div(g.vectors * g.strips, 32) * 32;
  return launch<kKernel>(g.parts() * g.chunks, threads, shared_bytes<Tr>(g), stream,
                         Args<typename Tr::Params>{p, g});
}

// Calls f(Traits()) with the traits of a problem, whose window has been checked.
template <template <class, int, int, int> class Traits, class Params, class F>
auto with_traits(const Params& p, bool aligned, F&& f) {
  return with_window<float, half, bf16>(p.dtype, p.window, [&](auto element, auto kernel, auto stride) {
    using T = decltype(element);
    constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
    constexpr int kChannels = Traits<T, kKernel, kStride, 1>::most_channels();
    if (aligned && p.c % kChannels == 0) return f(Traits<T, kKernel, kStride, kChannels>());
    return f(Traits<T, kKernel, kStride, 1>());
  });
}

}  // namespace
}  // namespace effnet::cuda
