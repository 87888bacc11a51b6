// fused_mbconv: a dense convolution, BatchNorm and activation, then the 1x1 projection, its BatchNorm and the
// residual: two GEMMs back to back. Without projection the first one is the op (stems, and V2's first stage).
// In 16 bits stems go to stem.cu, and the channels that V2 mostly has to fused_mbconv_resident.cu.
//
// Designed for e (P_in C_in + P_out C_out) bytes from and to DRAM, element size e; the expanded map, e P_out
// C_mid written and read, never exists.
//
// A block owns a rectangle of up to 128 output pixels. The rectangle of x under it lies in shared memory,
// once for all taps: row m of the implicit GEMM under tap (i, j) is the pixel (m's row * stride + i, m's
// column * stride + j) of it, one addition away. The block walks over chunks of 64 expanded channels as
// attention walks over keys: the weight of the chunk streams through three stages of 64 bytes of depth, the
// chunk's results are normalised, activated, rounded and put into shared memory, and a second GEMM adds them
// to the projection in registers. Weights come from the L2 for every block: e (taps C_in + C_out) C_mid bytes
// for 128 pixels.
//
// 256 threads. With up to 64 output channels 128 registers, two blocks on a multiprocessor; up to 128, one
// block. Channels per tap are padded to 16 with zeros. Maps whose channels are not whole 16 bytes, or that
// are not NHWC (an image of a stem), are read element by element, at any strides.
#include "cuda/gemm.cuh"

namespace effnet::cuda {
namespace {

constexpr int kStages = 3;

struct Args {
  FusedMBConvParams p;
  bool vector_x, vector_weight, vector_project, vector_out;  // rows are made of aligned 16 bytes
  int tile_h, tile_w, tiles_h, tiles_w;                      // output pixels of a block, blocks of an image
  int halo_h, halo_w;                                        // input pixels of a block
  int depth;    // input channels of the rectangle in shared memory, a multiple of 16
  int tiles_n;  // blocks that share pixels
};

// kOut is 0 without projection.
template <class T, int kMid, int kOut>
struct Shared {
  using MidTile = BlockTile<kMid>;
  using OutTile = BlockTile<kOut == 0 ? kMid : kOut>;
  static constexpr int kStage = kMid * Stage<T>::kStride;  // elements
  static constexpr int kMidStride = kMid + kVector<T>;
  static constexpr int kOutStride = OutTile::kColumns + kVector<T>;
  static constexpr int kChunk =
      MidTile::kRows * kMidStride + kOut * kMidStride;  // activated chunk, projection's weight
  static_assert(kOut == 0 || kOut == kMid || kOut == 2 * kMid);
  static_assert(MidTile::kRows * kOutStride <= kChunk, "y is put together where the chunk was");

  static int64_t bytes(int64_t halo_pixels, int depth) {
    return (kMid + OutTile::kColumns) * sizeof(Affine) +
           (kStages * kStage + kChunk + halo_pixels * (depth + kVector<T>)) * sizeof(T);
  }
};

// The rectangle of x from (h0, w0) on, channels [c0, c0 + args.depth), with zeros in the padding.
template <class T>
__device__ __forceinline__ void load_halo(T* shared, const Args& args, int64_t image, int h0, int w0,
                                          int c0) {
  const FusedMBConvParams& p = args.p;
  const T* x = static_cast<const T*>(p.x) + image * p.x_stride[0];
  const int stride = args.depth + kVector<T>, step = args.vector_x ? kVector<T> : 1,
            pieces = args.depth / step;
  for (int i = threadIdx.x; i < args.halo_h * args.halo_w * pieces; i += kGemmThreads) {
    const int pixel = i / pieces, c = c0 + i % pieces * step;
    const int h = h0 + pixel / args.halo_w, w = w0 + pixel % args.halo_w;
    const bool there = 0 <= h && h < p.h && 0 <= w && w < p.w && c < p.c_in;
    T* to = shared + pixel * stride + i % pieces * step;
    const T* from = x + h * p.x_stride[1] + w * p.x_stride[2] + c * p.x_stride[3];
    if (args.vector_x) {
      cp_async_16(to, there ? from : static_cast<const T*>(p.x), there ? 16 : 0);
    } else {
      *to = there ? *from : from_float<T>(0.0f);
    }
  }
}

template <class T, int kMid, int kOut>
__global__ void __launch_bounds__(kGemmThreads, kOut <= 64 ? 2 : 1)
    fused_mbconv_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  using S = Shared<T, kMid, kOut>;
  using MidTile = typename S::MidTile;
  using OutTile = typename S::OutTile;
  constexpr bool kExact = sizeof(T) == 4, kProject = kOut > 0;
  constexpr int kDepth = Stage<T>::kDepth, kStride = Stage<T>::kStride;
  Affine* affine = reinterpret_cast<Affine*>(shared_memory);
  Affine* project_affine = affine + kMid;
  T* stages = reinterpret_cast<T*>(project_affine + OutTile::kColumns);
  T* chunk = stages + kStages * S::kStage;                   // [128, kMidStride]
  T* project_tile = chunk + MidTile::kRows * S::kMidStride;  // [kOut, kMidStride]
  T* halo = chunk + S::kChunk;
  const FusedMBConvParams& p = args.p;
  const T* weight = static_cast<const T*>(p.weight);
  const T* project = static_cast<const T*>(p.project);

  const int n0 = static_cast<int>(blockIdx.x % args.tiles_n) * OutTile::kColumns;
  const int place = static_cast<int>(blockIdx.x / args.tiles_n % (args.tiles_h * args.tiles_w));
  const int64_t image = blockIdx.x / args.tiles_n / (args.tiles_h * args.tiles_w);
  const int oh0 = place / args.tiles_w * args.tile_h, ow0 = place % args.tiles_w * args.tile_w;
  const int h0 = oh0 * p.window.stride_h - p.window.top, w0 = ow0 * p.window.stride_w - p.window.left;
  const int halo_stride = args.depth + kVector<T>;
  const int taps = p.window.kh * p.window.kw;

  const LaneRows<T, MidTile> rows(
      [&](int row) {  // rows past the rectangle compute the first pixel again
        row = row < args.tile_h * args.tile_w ? row : 0;
        const int h = row / args.tile_w * p.window.stride_h, w = row % args.tile_w * p.window.stride_w;
        return (h * args.halo_w + w) * halo_stride;
      },
      kStride);
  const LaneRows<T, OutTile> chunk_rows(S::kMidStride, S::kMidStride);
  if constexpr (kProject) load_affine<T>(project_affine, p.project_bn, n0, OutTile::kColumns, p.c_out);

  // The steps of the first GEMM: chunks of expanded channels, parts of the input channels, taps, depth.
  struct Place {
    int mid, part = 0, tap = 0, k = 0;
    __device__ __forceinline__ void advance(const Args& args, int taps) {
      k += kDepth;
      if (k < args.depth) return;
      k = 0;
      if (++tap < taps) return;
      tap = 0;
      part += args.depth;
      if (part < args.p.c_in) return;
      part = 0;
      mid += kMid;
    }
  };
  const int first_mid = kProject ? 0 : n0, chunks = kProject ? ceil_div(p.c_mid, kMid) : 1;
  const int parts = ceil_div(p.c_in, args.depth);
  Place loaded = {first_mid}, at = {first_mid};

  Accumulators<MidTile> acc;
  Accumulators<OutTile> projected;
  clear<MidTile>(acc);
  if constexpr (kProject) clear<OutTile>(projected);

  const auto load = [&](int, int slot) {
    const int c = loaded.part + loaded.k;
    const T* from = weight + (static_cast<int64_t>(loaded.mid) * taps + loaded.tap) * p.c_in + c;
    const int left = p.c_in - c < args.depth - loaded.k ? p.c_in - c : args.depth - loaded.k;
    load_rows<kMid, kDepth, kStride>(stages + slot * S::kStage, from, static_cast<int64_t>(taps) * p.c_in,
                                     p.c_mid - loaded.mid, left, args.vector_weight);
    loaded.advance(args, taps);
  };

  const auto compute = [&](int step, int slot) {
    if (at.tap == 0 && at.k == 0) {  // nobody reads the last part or the last chunk any more
      if (at.part == 0) {
        load_affine<T>(affine, p.bn, at.mid, kMid, p.c_mid);
        if constexpr (kProject)
          load_rows<kOut, kMid, S::kMidStride>(project_tile,
                                               project + static_cast<int64_t>(n0) * p.c_mid + at.mid, p.c_mid,
                                               p.c_out - n0, p.c_mid - at.mid, args.vector_project);
      }
      if (step == 0 || parts > 1) {
        load_halo(halo, args, image, h0, w0, at.part);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
      }
    }
    const int i = at.tap / p.window.kw, j = at.tap % p.window.kw;
    multiply<kDepth, MidTile>(acc, halo + (i * args.halo_w + j) * halo_stride + at.k, rows,
                              stages + slot * S::kStage, kStride,
                              args.depth - at.k < kDepth ? args.depth - at.k : kDepth);
    const int mid = at.mid;
    at.advance(args, taps);
    if (kProject && at.mid != mid) {
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // the chunk's affine maps and its part of the projection are there
      batch_norm_act<MidTile, kExact>(acc, affine, p.act);
      const int channels = p.c_mid - mid;
      for_each_pair<MidTile>(acc, [&](int row, int column, float a, float b) {
        // Zeros past the last channel, where an infinite x times a weight of zero has left NaN.
        store_pair(chunk + row * S::kMidStride + column, column < channels ? a : 0.0f,
                   column + 1 < channels ? b : 0.0f);
      });
      clear<MidTile>(acc);
      __syncthreads();
      multiply<kMid, OutTile>(projected, chunk, chunk_rows, project_tile, S::kMidStride, kMid);
    }
  };
  const int depths = ceil_div(args.depth, kDepth);
  const int steps = chunks * parts * taps * depths;
  start_pipeline<kStages>(steps, load);
  run_pipeline<kStages>(steps, load, compute);
  __syncthreads();

  // ---- y, put together in shared memory ----
  T* out = chunk;
  const int columns = p.c_out - n0;
  const auto pixel = [&](int row) -> int64_t {  // -1: not in the map
    const int oh = oh0 + row / args.tile_w, ow = ow0 + row % args.tile_w;
    if (row >= args.tile_h * args.tile_w || oh >= p.oh || ow >= p.ow) return -1;
    return (image * p.oh + oh) * p.ow + ow;
  };
  if (p.residual) {
    const T* x = static_cast<const T*>(p.x);
    gather_rows<OutTile::kRows, OutTile::kColumns>(out, S::kOutStride, columns, args.vector_out, x,
                                                   [&](int row) {
                                                     const int64_t from = pixel(row);
                                                     return from < 0 ? nullptr : x + from * p.c_out + n0;
                                                   });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  const auto put = [&](int row, int column, float a, float b) {
    T* to = out + row * S::kOutStride + column;
    if (p.residual) {
      const float2 x = load_pair(to);
      a += x.x;
      b += x.y;
    }
    store_pair(to, a, b);
  };
  if constexpr (kProject) {
    batch_norm_act<OutTile, kExact>(projected, project_affine, kIdentity);
    for_each_pair<OutTile>(projected, put);
  } else {
    batch_norm_act<MidTile, kExact>(acc, affine, p.act);
    for_each_pair<MidTile>(acc, put);
  }
  __syncthreads();
  T* y = static_cast<T*>(p.y);
  scatter_rows<OutTile::kRows, OutTile::kColumns>(out, S::kOutStride, columns, args.vector_out, [&](int row) {
    const int64_t to = pixel(row);
    return to < 0 ? nullptr : y + to * p.c_out + n0;
  });
}

// Rectangle and depth: the fewest blocks, then the least of x read twice, within `limit` bytes. False where
// none fits.
template <class S>
bool cut(Args& args, int64_t limit) {
  const FusedMBConvParams& p = args.p;
  const int whole = ceil_div(p.c_in, 16) * 16;
  for (int depth = whole; depth >= 16; depth = depth > 64 ? 64 : depth / 2) {
    depth = ceil_div(depth, 16) * 16;
    int64_t least = INT64_MAX;
    for (int w = 1; w <= S::MidTile::kRows && w <= p.ow; ++w) {
      for (int h = S::MidTile::kRows / w < p.oh ? S::MidTile::kRows / w : p.oh; h >= 1;
           h = h > 1 ? h / 2 : 0) {
        const int64_t halo_h = static_cast<int64_t>(h - 1) * p.window.stride_h + p.window.kh;
        const int64_t halo_w = static_cast<int64_t>(w - 1) * p.window.stride_w + p.window.kw;
        if (S::bytes(halo_h * halo_w, depth) > limit) continue;
        const int64_t tiles = static_cast<int64_t>(ceil_div(p.oh, h)) * ceil_div(p.ow, w);
        const int64_t cost = tiles * (8 * S::MidTile::kRows + halo_h * halo_w);
        if (cost >= least) continue;
        least = cost;
        args.tile_h = h;
        args.tile_w = w;
        args.halo_h = static_cast<int>(halo_h);
        args.halo_w = static_cast<int>(halo_w);
        args.depth = depth;
        break;  // lower rectangles of this width only cost more
      }
    }
    // A rectangle of few pixels wastes most of a block's products; rather a part of the channels at a time.
    if (least < INT64_MAX && (depth == 16 || 2 * args.tile_h * args.tile_w >= S::MidTile::kRows ||
                              args.tile_h * args.tile_w == p.oh * p.ow))
      return true;
    if (depth == 16) return false;
  }
  return false;
}

template <class T, int kMid, int kOut>
Status launch_tile(const FusedMBConvParams& p, int shared_limit, cudaStream_t stream) {
  using S = Shared<T, kMid, kOut>;
  const auto whole = [](int64_t elements) { return elements % kVector<T> == 0; };
  Args args = {};
  args.p = p;
  args.vector_x = p.x_stride[3] == 1 && whole(p.x_stride[0]) && whole(p.x_stride[1]) &&
                  whole(p.x_stride[2]) && rows_of_16_bytes<T>(p.c_in, {p.x});
  args.vector_weight = rows_of_16_bytes<T>(p.c_in, {p.weight});
  args.vector_project = rows_of_16_bytes<T>(p.c_mid, {p.project});
  args.vector_out = rows_of_16_bytes<T>(p.c_out, {p.y, p.residual ? p.x : nullptr});
  args.tiles_n = ceil_div(p.c_out, S::OutTile::kColumns);
  const int limit_of_two = shared_limit / 2 - 1024;  // two blocks; the system takes 1 KB for each
  if (!(kOut <= 64 && cut<S>(args, limit_of_two)) && !cut<S>(args, shared_limit))
    return {cudaErrorInvalidValue, "the window of one output pixel does not fit into shared memory"};
  args.tiles_h = ceil_div(p.oh, args.tile_h);
  args.tiles_w = ceil_div(p.ow, args.tile_w);
  const int64_t blocks = p.n * args.tiles_h * args.tiles_w * args.tiles_n;
  const int bytes = static_cast<int>(S::bytes(static_cast<int64_t>(args.halo_h) * args.halo_w, args.depth));
  return launch<fused_mbconv_kernel<T, kMid, kOut>>(blocks, kGemmThreads, bytes, stream, args);
}

}  // namespace

Status launch_fused_mbconv(const FusedMBConvParams& p, int shared_limit, cudaStream_t stream) {
  if (stem_serves(p)) return launch_stem(p, stream);
  if (p.n * p.oh * p.ow == 0 || p.c_out == 0) return {};
  if (fused_mbconv_resident_serves(p, shared_limit))
    return launch_fused_mbconv_resident(p, shared_limit, stream);
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.project == nullptr)
      return p.c_mid <= 32 ? launch_tile<T, 32, 0>(p, shared_limit, stream)
                           : launch_tile<T, 64, 0>(p, shared_limit, stream);
    if constexpr (sizeof(T) == 2) {
      if (p.c_out > 64) return launch_tile<T, 64, 128>(p, shared_limit, stream);
    }
    return launch_tile<T, 64, 64>(p, shared_limit, stream);
  });
}

}  // namespace effnet::cuda
