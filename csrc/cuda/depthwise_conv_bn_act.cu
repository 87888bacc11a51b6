// act(bn(depthwise_conv(x))) over [N, H, W, C] in fp32, and the channel sums of the result: one read of x,
// one write of y. 16 bits go to depthwise_mma.cu.
//
// A thread computes a strip of kWidth output columns of kChannels channels and slides down the map. An input
// row is loaded (one row ahead) and added to the up to kKernel output rows that it belongs to, whose sums
// wait in registers. So each element is loaded (kWidth - 1 + kKernel / kStride) / kWidth times, halo
// included. The neighbours' halo comes from the L1; shared memory holds only the block's weights and
// BatchNorm.
//
// Budget: an H100 at 3.35 TB/s issues 70 lane-instructions in the time of 8 bytes. Counted in the machine
// code for sm_90a (tests/test_cuda_cubins.py holds them), SiLU, in the middle of a map, per element of y:
//
//     window  channels x width  load     instructions  registers  blocks of 128
//     3x3 s1  4 x 2            16 bytes  37            116        4
//     5x5 s1  4 x 2            16 bytes  58            151        3
//
// C that is no multiple of the vector, or maps that do not begin at one, take kChannels = 1, with the same
// bits.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"

namespace effnet::cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kSumRows = 8;  // output rows that one partial sum covers: the same whatever rows a block takes

// Where the blocks and threads lie; the same for a whole launch.
struct Geometry {
  int strips;       // of kWidth output columns, side by side in a block
  int strip_pairs;  // neighbouring lanes share channels: 2, or 1 where strips is odd
  int vectors;      // of kChannels channels, in a block
  int chunks;       // blocks side by side that cover all channels
  int tiles_w;      // blocks side by side that cover a row
  int tiles_h;      // blocks that cover a column, `rows` output rows each, a multiple of kSumRows
  int rows;
};

struct Args {
  DepthwiseParams p;
  Geometry g;
};

// A thread computes kWidth neighbouring columns of kChannels channels, row by row downwards.
template <class T_, int kKernel_, int kStride_, int kChannels_, int kWidth_, int kMinBlocks_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kStride = kStride_;
  static constexpr int kChannels = kChannels_, kWidth = kWidth_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kColumns = (kWidth - 1) * kStride + kKernel;  // of x that a strip reads
  static constexpr int kOpen = (kKernel + kStride - 1) / kStride;    // output rows that an input row adds to
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kRows = kTaps + 2;                      // in shared memory: taps, scale, shift
  static constexpr int kQuad = kChannels < 4 ? kChannels : 4;  // floats that one load from there brings
  static constexpr int kQuads = kChannels / kQuad;
};

// Shared memory has for every vector of channels its taps, scale and shift: [quad][vector][kRows][kQuad]
// floats, so that all addresses are constants from the thread's own. A vector's stride is an odd multiple of
// 16 bytes, so eight lanes that load 16 bytes each from eight vectors meet no bank twice.
template <class Tr>
__device__ __forceinline__ int shared_index(int vectors, int channel, int row) {
  const int vector = channel / Tr::kChannels, lane = channel % Tr::kChannels;
  return ((lane / Tr::kQuad * vectors + vector) * Tr::kRows + row) * Tr::kQuad + lane % Tr::kQuad;
}

// Row `row` of a thread's vector, which begins at `quads`.
template <class Tr>
__device__ __forceinline__ void load_shared(const float* const (&quads)[Tr::kQuads], int row,
                                            float (&out)[Tr::kChannels]) {
#pragma unroll
  for (int i = 0; i < Tr::kQuads; ++i) {
    if constexpr (Tr::kQuad == 4) {
      const float4 four = *reinterpret_cast<const float4*>(quads[i] + row * 4);
      out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
    } else if constexpr (Tr::kQuad == 2) {
      const float2 two = *reinterpret_cast<const float2*>(quads[i] + row * 2);
      out[0] = two.x, out[1] = two.y;
    } else {
      out[0] = quads[i][row];
    }
  }
}

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, Tr::kMinBlocks)
    depthwise_kernel(const __grid_constant__ Args args) {
  using T = typename Tr::T;
  constexpr int kChannels = Tr::kChannels, kWidth = Tr::kWidth, kColumns = Tr::kColumns;
  constexpr int kKernel = Tr::kKernel, kStride = Tr::kStride, kOpen = Tr::kOpen;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const DepthwiseParams& p = args.p;
  const Geometry& g = args.g;
  const int block_channels = g.vectors * kChannels;
  float* taps = reinterpret_cast<float*>(shared_memory);
  float* strip_sums = taps + Tr::kRows * block_channels;  // [strips][block_channels]

  unsigned block = blockIdx.x;
  const int chunk = static_cast<int>(block % static_cast<unsigned>(g.chunks));
  block /= static_cast<unsigned>(g.chunks);
  const int tile_w = static_cast<int>(block % static_cast<unsigned>(g.tiles_w));
  block /= static_cast<unsigned>(g.tiles_w);
  const int tile_h = static_cast<int>(block % static_cast<unsigned>(g.tiles_h));
  const int64_t n = block / static_cast<unsigned>(g.tiles_h);

  // Weights and BatchNorm of the block's channels, in fp32, once.
  const int first_channel = chunk * block_channels;
  const int channels = min(block_channels, p.c - first_channel);
  const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_channel) * Tr::kTaps;
  for (int i = static_cast<int>(threadIdx.x); i < channels * Tr::kTaps; i += static_cast<int>(blockDim.x)) {
    taps[shared_index<Tr>(g.vectors, i / Tr::kTaps, i % Tr::kTaps)] = to_float(weight[i]);
  }
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    const Affine bn = bn_affine<T>(p.bn, first_channel + i);
    taps[shared_index<Tr>(g.vectors, i, Tr::kTaps)] = bn.scale;
    taps[shared_index<Tr>(g.vectors, i, Tr::kTaps + 1)] = bn.shift;
  }
  __syncthreads();

  const int pairs = static_cast<int>(threadIdx.x) / g.strip_pairs;
  const int v = pairs % g.vectors;
  const int strip = pairs / g.vectors * g.strip_pairs + static_cast<int>(threadIdx.x) % g.strip_pairs;
  const int channel = v * kChannels;
  const bool works = channel < channels && strip < g.strips;

  const float* quads[Tr::kQuads];
#pragma unroll
  for (int i = 0; i < Tr::kQuads; ++i) quads[i] = taps + (i * g.vectors + v) * Tr::kRows * Tr::kQuad;

  const int column = (tile_w * g.strips + strip) * kWidth;
  const int columns = works ? p.ow - column : 0;  // output columns that exist, from this thread's first on
  const int x_column = column * kStride - p.window.left;
  uint32_t inside = 0;  // bit i: column i of the strip is there
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (x_column + i >= 0 && x_column + i < p.w) inside |= 1u << i;
  }
  if (columns <= 0) inside = 0;
  const bool all_inside = __all_sync(0xffffffffu, inside == (1u << kColumns) - 1);

  const int first_row = tile_h * g.rows;
  const int rows = min(g.rows, p.oh - first_row);
  const int first_x_row = first_row * kStride - p.window.top;
  const int x_end = min(first_x_row + (rows - 1) * kStride + kKernel, p.h);
  const int64_t x_pitch = static_cast<int64_t>(p.w) * p.c;
  const T* const x_map = static_cast<const T*>(p.x) + n * p.h * x_pitch;
  T* const y_map = static_cast<T*>(p.y) + (n * p.oh + first_row) * p.ow * p.c;
  const int x_offset = x_column * p.c + first_channel + channel;
  const int y_offset = column * p.c + first_channel + channel;

  Vec<T, kChannels> loaded[kColumns];
  const auto load_row = [&](int x_row) {
    const T* const from = x_map + x_row * x_pitch + x_offset;
    if (x_row >= 0 && x_row < x_end && all_inside) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) loaded[i] = Vec<T, kChannels>::load_constant(from + i * p.c);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) loaded[i] = Vec<T, kChannels>::zero();
      if (x_row < 0 || x_row >= x_end) return;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (inside >> i & 1) loaded[i] = Vec<T, kChannels>::load_constant(from + i * p.c);
      }
    }
  };

  // Row `step - j` of the output is open as acc[j]. With every step it moves on by one, in the first
  // multiplication that adds to it.
  float acc[kOpen][kWidth][kChannels];
  float total[kChannels] = {};
  load_row(first_x_row);
#pragma unroll 1
  for (int step = 0; step < rows + kOpen - 1; ++step) {
#pragma unroll
    for (int phase = 0; phase < kStride; ++phase) {
      float x[kColumns][kChannels];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        loaded[i].to_floats(x[i]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) keep(x[i][c]);
      }
      load_row(first_x_row + step * kStride + phase + 1);
#pragma unroll
      for (int j = kOpen - 1; j >= 0; --j) {
        const int kh = j * kStride + phase;
        if (kh >= kKernel || step - j < 0 || step - j >= rows) continue;
#pragma unroll
        for (int kw = 0; kw < kKernel; ++kw) {
          float tap[kChannels];
          load_shared<Tr>(quads, kh * kKernel + kw, tap);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              const float factor = x[i * kStride + kw][c];
              if (phase > 0 || kw > 0) {
                acc[j][i][c] = fmaf(factor, tap[c], acc[j][i][c]);
              } else if (j > 0) {
                acc[j][i][c] = fmaf(factor, tap[c], acc[j - 1][i][c]);
              } else {
                acc[j][i][c] = factor * tap[c];
              }
            }
          }
        }
      }
    }

    const int row = step - (kOpen - 1);
    if (row < 0) continue;
    float scale[kChannels], shift[kChannels];
    load_shared<Tr>(quads, Tr::kTaps, scale);
    load_shared<Tr>(quads, Tr::kTaps + 1, shift);
    T* const y_row = y_map + static_cast<int64_t>(row) * p.ow * p.c;
    float z[kWidth * kChannels];
#pragma unroll
    for (int i = 0; i < kWidth * kChannels; ++i) {
      z[i] = fmaf(acc[kOpen - 1][i / kChannels][i % kChannels], scale[i % kChannels], shift[i % kChannels]);
    }
    activate<!kIs16Bit<T>>(p.act, z);
    const auto finish = [&](int i) {
      float y[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        y[c] = z[i * kChannels + c];
        total[c] += y[c];
      }
      Vec<T, kChannels>::from_floats(y).store(y_row + (y_offset + i * p.c));
    };
    if (columns >= kWidth) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) finish(i);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth - 1; ++i) {
        if (i < columns) finish(i);
      }
    }

    if (p.sums == nullptr || ((row + 1) % kSumRows != 0 && row + 1 != rows)) continue;
    if (works) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        strip_sums[strip * block_channels + channel + c] = total[c];
        total[c] = 0;
      }
    }
    __syncthreads();
    const int64_t tile = (n * ceil_div(p.oh, kSumRows) + (first_row + row) / kSumRows) * g.tiles_w + tile_w;
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
      float sum = 0;
      for (int i = 0; i < g.strips; ++i) sum += strip_sums[i * block_channels + c];
      p.sums[tile * p.c + first_channel + c] = sum;
    }
    __syncthreads();
  }
}

// ---- launcher --------------------------------------------------------------------------------------------

// Channels and columns of a thread, and blocks per multiprocessor, as registers allow: see the head of this
// file.
template <int kKernel, int kStride, bool kVectorised>
using Choose = Traits<float, kKernel, kStride, kVectorised ? 4 : 1, 2, (kVectorised && kKernel > 3) ? 3 : 4>;

// Strips and tiles come from the shape alone: they decide in which order sums are added up.
struct Columns {
  int strips, tiles_w;
};

Columns columns_of(const DepthwiseParams& p) {
  using Tr = Choose<3, 1, true>;  // channels and width are those of all
  const int vectors = ceil_div(p.c, Tr::kChannels);
  const int most = vectors >= 16 ? 8 : vectors >= 8 ? 16 : 32;
  const int strips = ceil_div(p.ow, Tr::kWidth);
  const int tiles_w = ceil_div(strips, most);
  return {ceil_div(strips, tiles_w), tiles_w};
}

// As many channels per block as fill its warps best.
template <class Tr>
int vectors_of_block(int vectors, int strips) {
  constexpr int kSharedBytes = 24 * 1024;
  const int most = std::min({vectors, kMaxThreads / strips, kSharedBytes / (Tr::kRows * Tr::kChannels * 4)});
  int best = 1, best_warps = ceil_div(vectors, 1) * ceil_div(strips, 32);
  for (int v = 2; v <= most; ++v) {
    const int warps = ceil_div(vectors, v) * ceil_div(v * strips, 32);
    if (warps <= best_warps) best = v, best_warps = warps;
  }
  return best;
}

template <class Tr>
Status launch_typed(const DepthwiseParams& p, const Columns& columns, cudaStream_t stream) {
  Args args{p, {}};
  Geometry& g = args.g;
  g.strips = columns.strips;
  g.tiles_w = columns.tiles_w;
  g.strip_pairs = g.strips % 2 == 0 ? 2 : 1;
  const int vectors = p.c / Tr::kChannels;
  g.vectors = vectors_of_block<Tr>(vectors, g.strips);
  g.chunks = ceil_div(vectors, g.vectors);

  // Long columns re-read fewer rows, short ones make more blocks: at least 16 per multiprocessor, if there
  // can be.
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return {error, nullptr};
  const int64_t blocks_across = p.n * g.tiles_w * g.chunks;
  g.rows = 4 * kSumRows;
  while (g.rows > kSumRows && blocks_across * ceil_div(p.oh, g.rows) < 16 * multiprocessors) g.rows /= 2;
  g.tiles_h = ceil_div(p.oh, g.rows);

  const int threads = ceil_div(g.vectors * g.strips, 32) * 32;
  const int shared_bytes = (Tr::kRows + g.strips) * g.vectors * Tr::kChannels * 4;
  return launch<depthwise_kernel<Tr>>(blocks_across * g.tiles_h, threads, shared_bytes, stream, args);
}

}  // namespace

int depthwise_tiles(const DepthwiseParams& p) {
  return p.dtype == DType::kFloat32 ? ceil_div(p.oh, kSumRows) * columns_of(p).tiles_w
                                    : depthwise_mma_tiles(p);
}

Status launch_depthwise_conv_bn_act(const DepthwiseParams& p, cudaStream_t stream) {
  const Status status = check_window(p.window);
  if (!status.ok()) return status;
  // Offsets within a row are 32 bit, and a block may reach past its end and that of the padding.
  if ((std::max<int64_t>(p.w, int64_t{p.ow} * p.window.stride_w) + 1024) * p.c > INT32_MAX) {
    return {cudaErrorInvalidValue, "a row of x must have fewer than 2^31 elements"};
  }
  if (p.n == 0 || p.oh == 0 || p.ow == 0 || p.c == 0) return {};
  if (p.dtype != DType::kFloat32) return launch_depthwise_mma(p, stream);
  const Columns columns = columns_of(p);
  return with_window(p.window, [&](auto kernel, auto stride) {
    constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
    const bool vectorised = p.c % 4 == 0 && is_aligned(p.x, 16) && is_aligned(p.y, 16);
    return vectorised ? launch_typed<Choose<kKernel, kStride, true>>(p, columns, stream)
                      : launch_typed<Choose<kKernel, kStride, false>>(p, columns, stream);
  });
}

}  // namespace effnet::cuda
