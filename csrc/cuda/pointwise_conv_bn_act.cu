// pointwise_conv_bn_act: a GEMM with the gate in its prologue and BatchNorm, activation, residual or pool in
// its epilogue.
//
// Designed for one read of x and of the residual and one write of y from DRAM: e P (C_in + C_out [+ C_out])
// bytes for P pixels of element size e. Blocks that share pixels are neighbours in the grid, so only the
// first of them looks for x outside the L2; the weight stays there. From the L2 a block reads e C_in (128 +
// columns).
//
// A block is 256 threads and computes 128 pixels by 32, 64 or 128 channels, in a pipeline of three stages of
// 64 bytes of depth: 38, 46 or 61 KB of shared memory, in which y is put together afterwards so that it
// leaves in rows of 16 bytes a thread. In 16-bit types registers (up to 64, 80, 128) leave room for 4, 3 and
// 2 blocks on a multiprocessor, 2 at 64 channels with the gate or the pool; in fp32 for 2.
//
// With the pool a block owns all pixels of an image for its channels and adds them up in order; y is never
// written.
#include "cuda/gemm.cuh"

namespace effnet::cuda {
namespace {

constexpr int kStages = 3;

struct Args {
  PointwiseParams p;
  bool vector_in, vector_out;  // rows of x and weight, and of y, are made of aligned 16 bytes
  int tiles_n;
};

template <class T, class Tile>
struct Shared {
  static constexpr int kStage = (Tile::kRows + Tile::kColumns) * Stage<T>::kStride;  // elements
  static constexpr int kOutStride = Tile::kColumns + kVector<T>;                     // elements
  static constexpr int kBytes =
      Tile::kColumns * static_cast<int>(sizeof(Affine)) + kStages * kStage * static_cast<int>(sizeof(T));
  static_assert(Tile::kRows * kOutStride <= kStages * kStage, "y is put together where the stages were");
};

// x * gate on the way from shared memory to the tensor cores. There every element passes two warps, so it is
// multiplied twice (one instruction for two elements); but the copies into shared memory stay asynchronous,
// which a multiplication while staging would end, and images may change inside a tile, which a gate
// multiplied into the weight would forbid. The gate is rounded to the 16-bit type, as stock layers do. It
// comes from the L1: lanes of a row share a sector.
template <class T, class Tile>
struct GatePrologue {
  const float* gate[Tile::kM][2];  // of the images of this thread's rows
  int first = 0, channels;         // input channel of depth 0 of the stage
  bool vector;

  __device__ __forceinline__ GatePrologue(const Args& args, int64_t first_row) : channels(args.p.c_in) {
    vector = args.vector_in;
    const int64_t image = first_row / args.p.pixels;
    const int64_t rest = args.p.pixels - (first_row - image * args.p.pixels);  // rows of the first image
    const unsigned pixels = args.p.pixels < Tile::kRows ? static_cast<unsigned>(args.p.pixels) : Tile::kRows;
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Tile::first_row() + 16 * m + 8 * half + threadIdx.x % 32 / 4;
        const int64_t at = row < rest ? image : image + 1 + static_cast<unsigned>(row - rest) / pixels;
        gate[m][half] = args.p.gate + (at < args.p.n ? at : args.p.n - 1) * channels;
      }
  }

  __device__ __forceinline__ float2 pair(const float* from, int k) const {
    if (vector) return k < channels ? *reinterpret_cast<const float2*>(from + k) : float2{0.0f, 0.0f};
    return {k < channels ? from[k] : 0.0f, k + 1 < channels ? from[k + 1] : 0.0f};
  }

  static __device__ __forceinline__ uint32_t product(uint32_t x, float2 gate) {
    using Pair = std::conditional_t<std::is_same_v<T, half>, __half2, __nv_bfloat162>;
    return bit_cast<uint32_t>(__hmul2(bit_cast<Pair>(x), bit_cast<Pair>(pack<T>(gate.x, gate.y))));
  }

  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int m, int k) const {
    const int at = first + k + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = product(a[i], pair(gate[m][i % 2], at + i / 2 * 8));
  }

  __device__ __forceinline__ void operator()(float4 (&a)[2], int m, int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 left = pair(gate[m][half], first + k), right = pair(gate[m][half], first + k + 2);
      a[half] = {a[half].x * left.x, a[half].y * left.y, a[half].z * right.x, a[half].w * right.y};
    }
  }
};

// Blocks for which a multiprocessor has registers.
template <class T, class Tile, bool kGate, bool kPool>
constexpr int kBlocks = kPool || sizeof(T) == 4 || Tile::kColumns == 128 ? 2
                        : Tile::kColumns == 32                           ? 4
                        : kGate                                          ? 2
                                                                         : 3;

template <class T, class Tile, bool kGate, bool kPool>
__global__ void __launch_bounds__(kGemmThreads, kBlocks<T, Tile, kGate, kPool>)
    pointwise_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  using S = Shared<T, Tile>;
  constexpr int kDepth = Stage<T>::kDepth, kStride = Stage<T>::kStride;
  Affine* affine = reinterpret_cast<Affine*>(shared_memory);
  T* stages = reinterpret_cast<T*>(affine + Tile::kColumns);
  const PointwiseParams& p = args.p;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const T* residual = static_cast<const T*>(p.residual);

  const int n0 = static_cast<int>(blockIdx.x % args.tiles_n) * Tile::kColumns;
  const int64_t group = blockIdx.x / args.tiles_n;
  // A pooling block walks over the tiles of an image, any other has one tile of the batch.
  const int64_t first = group * (kPool ? p.pixels : Tile::kRows);
  const int64_t end = kPool ? first + p.pixels : p.n * p.pixels;
  const int tiles = kPool ? static_cast<int>(ceil_div<int64_t>(p.pixels, Tile::kRows)) : 1;

  load_affine<T>(affine, p.bn, n0, Tile::kColumns, p.c_out);
  const LaneRows<T, Tile> rows([](int row) { return row * kStride; });
  std::conditional_t<kGate, GatePrologue<T, Tile>, NoPrologue> prologue = [&] {
    if constexpr (kGate) {
      return GatePrologue<T, Tile>(args, first);
    } else {
      return NoPrologue();
    }
  }();
  Accumulators<Tile> acc;
  clear<Tile>(acc);
  float sum[kPool ? Tile::kN : 1][2] = {};

  int64_t loaded_row = first;
  int loaded_k = 0;
  const auto load = [&](int, int slot) {
    T* a = stages + slot * S::kStage;
    load_rows<Tile::kRows, kDepth>(a, kStride, p.c_in - loaded_k, args.vector_in, x, [&](int row) {
      return loaded_row + row < end ? x + (loaded_row + row) * p.c_in + loaded_k : nullptr;
    });
    load_rows<Tile::kColumns, kDepth>(
        a + Tile::kRows * kStride, kStride, p.c_in - loaded_k, args.vector_in, weight, [&](int row) {
          return n0 + row < p.c_out ? weight + static_cast<int64_t>(n0 + row) * p.c_in + loaded_k : nullptr;
        });
    loaded_k += kDepth;
    if (loaded_k >= p.c_in) {
      loaded_k = 0;
      loaded_row += Tile::kRows;
    }
  };

  int64_t row0 = first;
  int k0 = 0;
  const auto compute = [&](int, int slot) {
    const T* a = stages + slot * S::kStage;
    if constexpr (kGate) prologue.first = k0;
    if (row0 + Tile::first_row() < end)  // the warp has rows in the map
      multiply<kDepth, Tile>(acc, a, rows, a + Tile::kRows * kStride, kStride, p.c_in - k0, prologue);
    k0 += kDepth;
    if (kPool && k0 >= p.c_in) {
      batch_norm_act<Tile, sizeof(T) == 4>(acc, affine, p.act);
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + Tile::first_row() + 16 * m + threadIdx.x % 32 / 4 + i / 2 * 8;
            const int column = n0 + Tile::first_column() + 8 * n + threadIdx.x % 4 * 2 + i % 2;
            float value = row < end ? acc[m][n][i] : 0.0f;
            if (residual != nullptr && row < end && column < p.c_out)
              value += to_float(residual[row * p.c_out + column]);
            sum[kPool ? n : 0][i % 2] += value;
          }
      clear<Tile>(acc);
      k0 = 0;
      row0 += Tile::kRows;
    }
  };
  pipeline<kStages>(tiles * ceil_div(p.c_in, kDepth), load, compute);
  __syncthreads();

  if constexpr (kPool) {
    // Down the columns of a warp, then over the warps, each in order.
    float* partial = reinterpret_cast<float*>(stages);  // [warps down, columns]
    const int warp_row = Tile::first_row() / (16 * Tile::kM), lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float total = sum[n][i];
        for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
        if (lane < 4)
          partial[warp_row * Tile::kColumns + Tile::first_column() + 8 * n + 2 * lane + i] = total;
      }
    __syncthreads();
    for (int column = threadIdx.x; column < Tile::kColumns && n0 + column < p.c_out; column += kGemmThreads) {
      float total = 0.0f;
      for (int warp = 0; warp < Tile::kWarpsM; ++warp) total += partial[warp * Tile::kColumns + column];
      static_cast<T*>(p.y)[group * p.c_out + n0 + column] =
          from_float<T>(total / static_cast<float>(p.pixels));
    }
  } else {
    T* out = stages;
    const int columns = p.c_out - n0;
    if (residual != nullptr) {
      load_rows<Tile::kRows, Tile::kColumns>(
          out, S::kOutStride, columns, args.vector_out, residual,
          [&](int row) { return first + row < end ? residual + (first + row) * p.c_out + n0 : nullptr; });
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
    }
    batch_norm_act<Tile, sizeof(T) == 4>(acc, affine, p.act);
    for_each_pair<Tile>(acc, [&](int row, int column, float a, float b) {
      T* to = out + row * S::kOutStride + column;
      if (residual != nullptr) {
        const float2 r = load_pair(to);
        a += r.x;
        b += r.y;
      }
      store_pair(to, a, b);
    });
    __syncthreads();
    T* y = static_cast<T*>(p.y);
    store_rows<Tile::kRows, Tile::kColumns>(out, S::kOutStride, columns, args.vector_out, [&](int row) {
      return first + row < end ? y + (first + row) * p.c_out + n0 : nullptr;
    });
  }
}

template <class T, int kColumns, bool kGate, bool kPool>
Status launch_tile(const PointwiseParams& p, cudaStream_t stream) {
  using Tile = BlockTile<kColumns>;
  Args args = {p, rows_of_16_bytes<T>(p.c_in, {p.x, p.weight, p.gate}),
               rows_of_16_bytes<T>(p.c_out, {p.y, p.residual}), ceil_div(p.c_out, kColumns)};
  const int64_t groups = kPool ? p.n : ceil_div<int64_t>(p.n * p.pixels, Tile::kRows);
  return launch<pointwise_kernel<T, Tile, kGate, kPool>>(groups * args.tiles_n, kGemmThreads,
                                                         Shared<T, Tile>::kBytes, stream, args);
}

template <class T, bool kGate>
Status launch_columns(const PointwiseParams& p, cudaStream_t stream) {
  if (p.pool) return launch_tile<T, 64, kGate, true>(p, stream);
  if (p.c_out <= 32) return launch_tile<T, 32, kGate, false>(p, stream);
  // Wide tiles read x from the L2 half as often; not where they would leave half of the last one idle.
  if constexpr (sizeof(T) == 2) {
    if (ceil_div(p.c_out, 128) * 128 == ceil_div(p.c_out, 64) * 64)
      return launch_tile<T, 128, kGate, false>(p, stream);
  }
  return launch_tile<T, 64, kGate, false>(p, stream);
}

}  // namespace

Status launch_pointwise_conv_bn_act(const PointwiseParams& p, cudaStream_t stream) {
  if (p.n * p.pixels == 0 || p.c_out == 0) return {};
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.gate != nullptr ? launch_columns<T, true>(p, stream) : launch_columns<T, false>(p, stream);
  });
}

}  // namespace effnet::cuda
