// pointwise_conv_bn_act: a GEMM with the gate in its prologue and BatchNorm, activation, residual or pool in
// its epilogue.
//
// Designed for one read of x and of the residual and one write of y from DRAM: e P (C_in + C_out [+ C_out])
// bytes for P pixels of element size e. Blocks that share pixels are neighbours in the grid, so only the
// first of them looks for x outside the L2; the weight stays there. From the L2 a block reads e C_in (rows +
// columns).
//
// A block is 256 threads and computes 128 pixels by 32, 64, 96 or 128 channels, in a pipeline of three stages
// of 64 bytes of depth: 38, 46, 53 or 61 KB of shared memory, in which y is put together afterwards so that
// it leaves in rows of 16 bytes a thread. Where these would be fewer than two blocks for a multiprocessor, it
// computes 64 pixels by 64 channels in four stages (41 KB). In 16-bit types registers leave room for 4, 3, 2
// and 2 blocks on a multiprocessor, with the gate for 3, 2, 2 and 2, at 64 by 64 for 4, with the pool for 2;
// in fp32 for 2.
//
// With the pool a block owns all pixels of an image for its channels and adds them up in order; y is never
// written. Two images of up to 64 pixels, or four of up to 32, share a block and what it reads of the weight.
// They begin where the rows of a warp do, so an image is added up in the same order whichever it is.
#include "cuda/gemm.cuh"

namespace effnet::cuda {
namespace {

struct Args {
  PointwiseParams p;
  bool vector_in, vector_out;  // rows of x and weight, and of y, are made of aligned 16 bytes
  int tiles_n;
  int image_rows;  // with the pool: of the rows of a tile, how many are one image's; a power of two
};

template <class T, class Tile>
struct Shared {
  static constexpr int kStages = Tile::kRows == 64 ? 4 : 3;
  static constexpr int kStage = (Tile::kRows + Tile::kColumns) * Stage<T>::kStride;  // elements
  static constexpr int kOutStride = Tile::kColumns + kVector<T>;                     // elements
  static constexpr int kBytes =
      Tile::kColumns * static_cast<int>(sizeof(Affine)) + kStages * kStage * static_cast<int>(sizeof(T));
  static_assert(Tile::kRows * kOutStride <= kStages * kStage, "y is put together where the stages were");
};

// x * gate, in shared memory. Each thread multiplies what it has copied itself, when it has arrived and
// before the barrier that shows it to the others: so every element is multiplied once, and the copies stay
// asynchronous. (Images may change inside a tile, which a gate multiplied into the weight would forbid.) The
// gate is rounded to the 16-bit type, as stock layers do. It is fetched a stage ahead, into registers.
template <class T, class Tile>
class Gate {
  using Mine = Pieces<T, Tile::kRows, Stage<T>::kDepth>;
  const float* gate_[Mine::kCount];  // at depth 0, of the images of this thread's rows
  alignas(16) float value_[Mine::kCount][kVector<T>] = {};

  static __device__ __forceinline__ uint32_t product(uint32_t x, float low, float high) {
    using Pair = std::conditional_t<std::is_same_v<T, half>, __half2, __nv_bfloat162>;
    return bit_cast<uint32_t>(__hmul2(bit_cast<Pair>(x), bit_cast<Pair>(pack<T>(low, high))));
  }

 public:
  // image_of(row) is asked for rows of the tile; beyond the batch it is any number of an image.
  template <class ImageOf>
  __device__ __forceinline__ Gate(const PointwiseParams& p, ImageOf image_of) {
#pragma unroll
    for (int i = 0; i < Mine::kCount; ++i) {
      const int64_t image = image_of(Mine::first_row() + i * Mine::kStep);
      gate_[i] = p.gate + (image < p.n ? image : p.n - 1) * p.c_in + Mine::column();
    }
  }

  // Of the stage at depth k of `channels`.
  __device__ __forceinline__ void fetch(int k, int channels, bool vector) {
    const int there = channels - k - Mine::column();  // of this thread's
    if (vector) {
      if (there > 0) {
#pragma unroll
        for (int i = 0; i < Mine::kCount; ++i)
#pragma unroll
          for (int j = 0; j < kVector<T>; j += 4)
            *reinterpret_cast<float4*>(value_[i] + j) =
                __ldg(reinterpret_cast<const float4*>(gate_[i] + k + j));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Mine::kCount; ++i)
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) value_[i][j] = j < there ? gate_[i][k + j] : 0.0f;
    }
  }

  // Multiplies the stage at depth k, whose gate has been fetched.
  __device__ __forceinline__ void apply(T* stage, int k, int channels) const {
    if (k + Mine::column() >= channels) return;
    stage += Mine::offset(Stage<T>::kStride);
#pragma unroll
    for (int i = 0; i < Mine::kCount; ++i) {
      T* at = stage + i * Mine::kStep * Stage<T>::kStride;
      auto x = Vec<T, kVector<T>>::load(at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          x.words[j] = bit_cast<uint32_t>(bit_cast<float>(x.words[j]) * value_[i][j]);
        } else {
          x.words[j] = product(x.words[j], value_[i][2 * j], value_[i][2 * j + 1]);
        }
      }
      x.store(at);
    }
  }
};

// Blocks for which a multiprocessor has registers.
template <class T, class Tile, bool kGate, bool kPool>
constexpr int kBlocks = kPool || sizeof(T) == 4 || Tile::kColumns > 64 ? 2
                        : Tile::kRows == 64                            ? 4
                        : Tile::kColumns == 32                         ? (kGate ? 3 : 4)
                                                                       : (kGate ? 2 : 3);

// With kWhole vector_in is known to hold: code for other rows would cost registers.
template <class T, class Tile, bool kWhole, bool kGate, bool kPool>
__global__ void __launch_bounds__(kGemmThreads, kBlocks<T, Tile, kGate, kPool>)
    pointwise_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  using S = Shared<T, Tile>;
  constexpr int kStages = S::kStages;
  constexpr int kDepth = Stage<T>::kDepth, kStride = Stage<T>::kStride;
  Affine* affine = reinterpret_cast<Affine*>(shared_memory);
  T* stages = reinterpret_cast<T*>(affine + Tile::kColumns);
  const PointwiseParams& p = args.p;
  const bool vector_in = kWhole || args.vector_in;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const T* residual = static_cast<const T*>(p.residual);

  const int n0 = static_cast<int>(blockIdx.x % args.tiles_n) * Tile::kColumns;
  const int64_t group = blockIdx.x / args.tiles_n;
  // With the pool a block walks over the tiles of an image, or has one tile of several small images, each of
  // which begins at a multiple of image_rows. Any other block has one tile of the batch.
  const int image_rows = args.image_rows, image_bits = __ffs(image_rows) - 1;
  const int64_t image0 = kPool ? group << (__ffs(Tile::kRows) - 1 - image_bits) : 0;
  const int64_t first = group * Tile::kRows;
  const int64_t left = kPool ? p.pixels : p.n * p.pixels - first;
  const int rows = kPool || left < Tile::kRows ? static_cast<int>(left) : Tile::kRows;
  const int tiles = kPool ? ceil_div(rows, Tile::kRows) : 1;

  const LaneRows<T, Tile> lane_rows(kStride, kStride);
  Accumulators<Tile> acc;
  clear<Tile>(acc);
  float sum[kPool ? Tile::kN : 1][2] = {};

  using X = Pieces<T, Tile::kRows, kDepth>;
  using Weight = Pieces<T, Tile::kColumns, kDepth>;  // of a stage; in the same columns as those of x
  int to = X::offset(kStride), loaded_channels = p.c_in - X::column(), loaded_rows = rows - X::first_row();
  keep(to);
  const T* x_from = x + X::column();
  int64_t x_step = static_cast<int64_t>(X::kStep) * p.c_in;
  if constexpr (kPool) {
    const int64_t image = image0 + (X::first_row() >> image_bits);
    const int pixel = X::first_row() & (image_rows - 1);
    x_from += (image * p.pixels + pixel) * p.c_in;
    if (image_rows <= X::kStep) {  // the next piece is the same pixel of a later image
      x_step = (X::kStep >> image_bits) * p.pixels * p.c_in;
      loaded_rows = pixel < rows ? static_cast<int>(min(p.n - image, int64_t{Tile::kRows})) * image_rows : 0;
    }
  } else {
    x_from += (first + X::first_row()) * p.c_in;
  }
  const T* weight_from = weight + static_cast<int64_t>(n0) * p.c_in + X::offset(int64_t{p.c_in});
  const int64_t weight_step = static_cast<int64_t>(Weight::kStep) * p.c_in;
  const auto load = [&](int, int slot) {
    T* a = stages + slot * S::kStage + to;
    T* b = a + Tile::kRows * kStride;
    const int weight_rows = p.c_out - n0 - X::first_row();
    if (vector_in) {
      copy_pieces<X, kStride, true>(a, x_from, x_step, loaded_rows, loaded_channels);
      copy_pieces<Weight, kStride, true>(b, weight_from, weight_step, weight_rows, loaded_channels);
    } else {
      copy_pieces<X, kStride, false>(a, x_from, x_step, loaded_rows, loaded_channels);
      copy_pieces<Weight, kStride, false>(b, weight_from, weight_step, weight_rows, loaded_channels);
    }
    x_from += kDepth;
    weight_from += kDepth;
    loaded_channels -= kDepth;
    if (kPool && loaded_channels <= -X::column()) {  // on to the image's next rows
      const int depth = p.c_in - X::column() - loaded_channels;
      x_from += static_cast<int64_t>(Tile::kRows) * p.c_in - depth;
      weight_from -= depth;
      loaded_rows -= Tile::kRows;
      loaded_channels += depth;
    }
  };

  int row0 = 0, k0 = 0;
  auto gate = [&] {
    if constexpr (kGate && kPool) {
      return Gate<T, Tile>(p, [&](int row) { return image0 + (row >> image_bits); });
    } else if constexpr (kGate) {
      const int64_t image = first / p.pixels;
      const int64_t rest = p.pixels - (first - image * p.pixels);  // rows of the first image
      const unsigned pixels = p.pixels < Tile::kRows ? static_cast<unsigned>(p.pixels) : Tile::kRows;
      return Gate<T, Tile>(p, [&](int row) {
        return row < rest ? image : image + 1 + static_cast<unsigned>(row - rest) / pixels;
      });
    } else {
      return 0;
    }
  }();
  const auto arrived = [&](int, int slot) {
    if constexpr (kGate) gate.apply(stages + slot * S::kStage, k0, p.c_in);
  };
  const auto compute = [&](int, int slot) {
    const T* a = stages + slot * S::kStage;
    if constexpr (kGate) {
      const int next = k0 + kDepth;
      gate.fetch(kPool && next >= p.c_in ? 0 : next, p.c_in, vector_in);
    }
    const int pixel = row0 + (Tile::first_row() & (image_rows - 1));  // with the pool: the warp's first one
    if (!kPool || pixel < rows)
      multiply<kDepth, Tile>(acc, a, lane_rows, a + Tile::kRows * kStride, kStride, p.c_in - k0);
    k0 += kDepth;
    if (kPool && k0 >= p.c_in) {
      batch_norm_act<Tile, sizeof(T) == 4>(acc, affine, p.act);
      const int64_t image = image0 + (Tile::first_row() >> image_bits);
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = pixel + 16 * m + threadIdx.x % 32 / 4 + i / 2 * 8;
            const int column = n0 + Tile::first_column() + 8 * n + threadIdx.x % 4 * 2 + i % 2;
            float value = at < rows ? acc[m][n][i] : 0.0f;
            if (residual != nullptr && at < rows && image < p.n && column < p.c_out)
              value += to_float(residual[(image * p.pixels + at) * p.c_out + column]);
            sum[kPool ? n : 0][i % 2] += value;
          }
      clear<Tile>(acc);
      k0 = 0;
      row0 += Tile::kRows;
    }
  };
  const int steps = tiles * ceil_div(p.c_in, kDepth);
  start_pipeline<kStages>(steps, load);
  if constexpr (kGate) gate.fetch(0, p.c_in, vector_in);
  load_affine<T>(affine, p.bn, n0, Tile::kColumns, p.c_out);
  run_pipeline<kStages>(steps, load, compute, arrived);
  __syncthreads();

  if constexpr (kPool) {
    // Down the columns of a warp, then over the warps of an image, each in order.
    constexpr int kWarpRows = 16 * Tile::kM;
    static_assert(kWarpRows <= 32, "an image has 32 rows or more");
    float* partial = reinterpret_cast<float*>(stages);  // [warps down, columns]
    const int warp_row = Tile::first_row() / kWarpRows, lane = threadIdx.x % 32;
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
    for (int i = threadIdx.x; i < Tile::kColumns * (Tile::kRows >> image_bits); i += kGemmThreads) {
      const int column = i % Tile::kColumns, at = i / Tile::kColumns, warps = image_rows / kWarpRows;
      if (n0 + column >= p.c_out || image0 + at >= p.n) continue;
      float total = 0.0f;
      for (int warp = 0; warp < warps; ++warp)
        total += partial[(at * warps + warp) * Tile::kColumns + column];
      static_cast<T*>(p.y)[(image0 + at) * p.c_out + n0 + column] =
          from_float<T>(total / static_cast<float>(p.pixels));
    }
  } else {
    T* out = stages;
    const int columns = p.c_out - n0;
    if (residual != nullptr) {
      load_rows<Tile::kRows, Tile::kColumns, S::kOutStride>(out, residual + first * p.c_out + n0, p.c_out,
                                                            rows, columns, args.vector_out);
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
    store_rows<Tile::kRows, Tile::kColumns, S::kOutStride>(out, static_cast<T*>(p.y) + first * p.c_out + n0,
                                                           p.c_out, rows, columns, args.vector_out);
  }
}

// Blocks of a problem in tiles of one kind.
template <class Tile>
int64_t blocks_of(const PointwiseParams& p) {
  return ceil_div<int64_t>(p.n * p.pixels, Tile::kRows) * ceil_div(p.c_out, Tile::kColumns);
}

template <class T, class Tile, bool kWhole, bool kGate>
Status launch_tile(const PointwiseParams& p, bool vector_in, cudaStream_t stream) {
  const Args args = {p, vector_in, rows_of_16_bytes<T>(p.c_out, {p.y, p.residual}),
                     ceil_div(p.c_out, Tile::kColumns), Tile::kRows};
  return launch<pointwise_kernel<T, Tile, kWhole, kGate, false>>(blocks_of<Tile>(p), kGemmThreads,
                                                                 Shared<T, Tile>::kBytes, stream, args);
}

// How many images share a tile depends on the shape alone.
template <class T, bool kGate>
Status launch_pooled(const PointwiseParams& p, bool vector_in, cudaStream_t stream) {
  using Tile = BlockTile<64>;
  if (p.pixels > INT32_MAX - Tile::kRows)
    return {cudaErrorInvalidValue, "the map has too many pixels for one block"};
  const int image_rows = p.pixels <= 32 ? 32 : p.pixels <= 64 ? 64 : Tile::kRows;
  const Args args = {p, vector_in, false, ceil_div(p.c_out, Tile::kColumns), image_rows};
  return launch<pointwise_kernel<T, Tile, false, kGate, true>>(
      ceil_div<int64_t>(p.n, Tile::kRows / image_rows) * args.tiles_n, kGemmThreads, Shared<T, Tile>::kBytes,
      stream, args);
}

// The tile depends on the batch, what it computes does not: see BlockTile.
template <class T, bool kGate>
Status launch_columns(const PointwiseParams& p, cudaStream_t stream) {
  const bool vector_in = rows_of_16_bytes<T>(p.c_in, {p.x, p.weight, p.gate});
  if (p.pool) return launch_pooled<T, kGate>(p, vector_in, stream);
  constexpr bool kWhole = sizeof(T) == 2;
  if (kWhole && !vector_in) return launch_tile<T, BlockTile<64>, false, kGate>(p, vector_in, stream);
  if (p.c_out <= 32) return launch_tile<T, BlockTile<32>, kWhole, kGate>(p, vector_in, stream);
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return {error, nullptr};
  const int64_t enough = 2 * multiprocessors;  // blocks
  if constexpr (sizeof(T) == 2) {
    // The width that leaves the fewest columns idle; of two the wider one, which reads x less often from the
    // L2.
    const auto width = [&p](int columns) { return ceil_div(p.c_out, columns) * columns; };
    if (width(128) <= width(96) && width(128) <= width(64)) {
      if (blocks_of<BlockTile<128>>(p) >= enough)
        return launch_tile<T, BlockTile<128>, kWhole, kGate>(p, vector_in, stream);
    } else if (width(96) <= width(64) && blocks_of<BlockTile<96>>(p) >= enough) {
      return launch_tile<T, BlockTile<96>, kWhole, kGate>(p, vector_in, stream);
    }
  }
  if (blocks_of<BlockTile<64>>(p) >= enough)
    return launch_tile<T, BlockTile<64>, kWhole, kGate>(p, vector_in, stream);
  return launch_tile<T, BlockTile<64, 64>, kWhole, kGate>(p, vector_in, stream);
}

}  // namespace

Status launch_pointwise_conv_bn_act(const PointwiseParams& p, cudaStream_t stream) {
  if (p.n * p.pixels == 0 || p.c_out == 0) return {};
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.gate != nullptr ? launch_columns<T, true>(p, stream) : launch_columns<T, false>(p, stream);
  });
}

}  // namespace effnet::cuda
