// fused_mbconv in 16 bits with weights that stay where they are multiplied: in shared memory, or in registers
// where there is no projection. 3x3 windows of the channels that EfficientNetV2 has, compiled for each.
//
// Designed for e (P_in C_in + P_out C_out) bytes from and to DRAM, element size e. From the L2 come the halo
// of every tile of 8 x 8 output pixels, 10 x 10 or 17 x 17 pixels of x, and the weights once a block: blocks
// are as many as the GPU holds, and each walks over tiles.
//
// The warps of a block are teams with a tile each, which share nothing but weights: while one activates,
// another multiplies. A warp has 32 pixels of its team's tile and all expanded channels or, with a projection
// or more than 24 of them, half.
//
// The window is a product over K = 9 C_in. The halo lies in shared memory as [pixel, channel], so that what a
// step of 16 in K reads is a constant away from the lane's pixel: the main loop is ldmatrix and mma alone.
// What comes out of the tensor cores is laid out as their first operand is: the activated and rounded
// channels are multiplied by the projection where they are, and the two halves of the sums meet in shared
// memory.
//
// Predictions for an H100 at batch 128, not measurements, if mma.sync reaches six tenths of the tensor cores'
// peak and a copy's bandwidth is reached to three quarters where DRAM is the limit:
//   48-192-48 at 96x96: 430 us; tensor cores 394, special functions 126, DRAM 75; 227 KB of shared memory.
//   24-24 at 192x192: 200 us; DRAM 151, instructions 113, special functions 63.
//   24-96-48 at stride 2, to 96x96: 170 us; DRAM 113, tensor cores 105, special functions 63.
#include "cuda/fused_mbconv_resident.cuh"

namespace effnet::cuda {
namespace {

// x * scale + shift for fragments of neighbouring columns, `affine` being those of the first.
template <int kM, int kN>
__device__ __forceinline__ void batch_norm(float (&x)[kM][kN][4], const Affine* affine) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const Affine left = affine[8 * n + threadIdx.x % 4 * 2], right = affine[8 * n + threadIdx.x % 4 * 2 + 1];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Affine of = i % 2 == 0 ? left : right;
        x[m][n][i] = fmaf(x[m][n][i], of.scale, of.shift);
      }
  }
}

// sums = the projection of a warp's activated channels, rounded. What the tensor cores have left in two
// neighbouring fragments of acc is an operand of theirs. `projects`: from the warp's first channel on.
template <class S>
__device__ __forceinline__ void project(float (&sums)[2][S::kOutN][4], const float (&acc)[2][S::kN][4],
                                        const typename S::T* projects) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32;
  projects += (lane / 16 * 8 + lane % 8) * S::kProjectRow + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < S::kN; k += 2) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] = pack<T>(acc[m][k + i / 2][i % 2 * 2], acc[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < S::kOutN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, projects + 8 * n * S::kProjectRow + 8 * k);
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<T>(sums[m][n], a[m], left);
        mma_m16n8k16<T>(sums[m][n + 1], a[m], right);
      }
    }
  }
}

// y = the whole sums of one fragment of pixels, number `part`. The other warp of these pixels has the other
// half of every sum: it is given the other fragment's, half of the columns at a time, through `stage`.
template <class S>
__device__ __forceinline__ void exchange(float (&y)[1][S::kOutN][4], const float (&sums)[2][S::kOutN][4],
                                         typename S::T* stage, int part) {
  constexpr int kHalf = S::kOutN / 2;
  const int lane = threadIdx.x % 32, pair = 1 + static_cast<int>(threadIdx.x) / 64;
  float* give = reinterpret_cast<float*>(stage) + lane;
  const float* take =
      reinterpret_cast<const float*>(part == 0 ? stage + S::kStage : stage - S::kStage) + lane;
#pragma unroll
  for (int first = 0; first < S::kOutN; first += kHalf) {
#pragma unroll
    for (int i = 0; i < 4 * kHalf; ++i) {
      const int n = first + i / 4;
      give[32 * i] = part == 0 ? sums[1][n][i % 4] : sums[0][n][i % 4];
      y[0][n][i % 4] = part == 0 ? sums[0][n][i % 4] : sums[1][n][i % 4];
    }
    bar_sync(pair, 64);
#pragma unroll
    for (int i = 0; i < 4 * kHalf; ++i) y[0][first + i / 4][i % 4] += take[32 * i];
    bar_sync(pair, 64);  // before it is written again
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    resident_kernel(const __grid_constant__ Args args) {
  using T = typename S::T;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Affine* affine = reinterpret_cast<Affine*>(shared_memory);
  Affine* project_affine = affine + S::kMid;
  Piece* pieces = reinterpret_cast<Piece*>(project_affine + S::kOut);
  T* weights = reinterpret_cast<T*>(pieces + S::kTable);  // [kMid, kWeightRow]
  T* projects = weights + S::kWeights;                    // [kOut, kProjectRow]
  const FusedMBConvParams& p = args.p;

  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int team = warp / S::kTeamWarps, part = warp % S::kSplit;  // part: which half of the channels
  const int first = part * 8 * S::kN;                              // of the warp's channels
  const int row0 = warp % S::kTeamWarps / S::kSplit * kRows;       // of the tile's pixels
  T* halos = projects + S::kProjects + team * S::kBuffers * S::kHalo;
  T* stage = projects + S::kProjects + S::kTeams * S::kBuffers * S::kHalo + warp * S::kStage;

  // ---- what stays ----
  if constexpr (S::kProject) {
    const auto copy = [](T* to, const void* from, int rows, int vectors, int row_elements) {
      for (int i = threadIdx.x; i < rows * vectors; i += S::kThreads)
        cp_async_16(to + i / vectors * row_elements + i % vectors * 8, static_cast<const T*>(from) + i * 8);
    };
    copy(weights, p.weight, S::kMid, S::kDepth / 8, S::kWeightRow);
    copy(projects, p.project, S::kOut, S::kMid / 8, S::kProjectRow);
    cp_async_commit();
  }
  const bool silu = p.act == kSilu;
  for (int i = threadIdx.x; i < S::kMid + S::kOut; i += S::kThreads) {
    const bool of_mid = i < S::kMid;
    const Affine of = of_mid ? bn_affine<T>(p.bn, i) : bn_affine<T>(p.project_bn, i - S::kMid);
    const float factor = affine_factor(of_mid && silu);
    affine[i] = {factor * of.scale, factor * of.shift};
  }
  for (int i = threadIdx.x; i < S::kPieces; i += S::kThreads) pieces[i] = piece_of<S>(p, i);
  __syncthreads();

  const int step = static_cast<int>(gridDim.x) * S::kTeams;
  int tile = static_cast<int>(blockIdx.x + gridDim.x * team);
  Place next(args, tile);
  if (tile < args.tiles) load_halo<S>(halos, args, pieces, next);
  const auto weight = [&] {
    if constexpr (S::kProject) {
      cp_async_wait<0>();
      __syncthreads();
      return SharedWeights<S>(weights, first);
    } else {
      return RegisterWeights<S>(p.weight, first);
    }
  }();

  const int pixel = row0 + lane % 16;
  const int lane_offset =
      (pixel / kTile * S::kStride * S::kHaloRows + pixel % kTile) * S::kPixel + lane / 16 * 8;
  // The warp's part of y: all of its pixels, or behind a projection one fragment of 16.
  constexpr int kM = S::kProject ? 1 : 2, kN = S::kProject ? S::kOutN : S::kN;
  const int y_row = row0 + (S::kProject ? 16 * part : 0), y_column = S::kProject ? 0 : first;

  for (int buffer = 0; tile < args.tiles; tile += step) {
    // ---- load ----
    const Place place = next;
    T* halo = halos + buffer * S::kHalo;
    cp_async_wait<0>();
    bar_sync(8 + team, S::kTeamThreads);  // the halo is there, and nobody reads the one before any more
    const auto load_next = [&] {
      if (S::kBuffers == 2) buffer ^= 1;
      next = Place(args, tile + step);
      if (tile + step < args.tiles) load_halo<S>(halos + buffer * S::kHalo, args, pieces, next);
    };
    if constexpr (S::kBuffers == 2) load_next();

    // ---- loop ----
    float acc[2][S::kN][4] = {};
    add_windows<S>(acc, halo + lane_offset, weight);

    constexpr bool kResidual = S::kStride == 1 && S::kIn == S::kColumns;
    uint32_t residual[kM][kN][2];  // x in the middle of the halo
    if (kResidual && p.residual) {
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        const int row = y_row + 8 * i + g;
        const T* x = halo + S::pixel_at(row / kTile + p.window.top, row % kTile + p.window.left);
#pragma unroll
        for (int n = 0; n < kN; ++n)
          residual[i / 2][n][i % 2] = *reinterpret_cast<const uint32_t*>(x + y_column + 8 * n + 2 * t);
      }
    }
    if constexpr (S::kBuffers == 1) {
      bar_sync(8 + team, S::kTeamThreads);  // nobody reads the halo any more
      load_next();
    }

    // ---- epilogue ----
    batch_norm(acc, affine + first);
    auto& values = reinterpret_cast<float (&)[2 * S::kN * 4]>(acc);
    if (silu) {
#pragma unroll
      for (float& x : values) x = silu_of_quarter(x);
    } else {
      activate<false>(p.act, values);
    }
    float projected[1][kN][4];
    if constexpr (S::kProject) {
      float sums[2][S::kOutN][4] = {};
      project<S>(sums, acc, projects + first);
      exchange<S>(projected, sums, stage, part);
      batch_norm(projected, project_affine);
    }
    // y is put together in shared memory and leaves in rows of 16 bytes a lane.
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float (&y)[4] = S::kProject ? projected[0][n] : acc[i / 2][n];
        float2 pair = {y[i % 2 * 2], y[i % 2 * 2 + 1]};
        if (kResidual && p.residual) {
          const float2 x = unpack<T>(residual[i / 2][n][i % 2]);
          pair = {pair.x + x.x, pair.y + x.y};
        }
        *reinterpret_cast<uint32_t*>(stage + (8 * i + g) * S::kStageRow + 8 * n + 2 * t) =
            pack<T>(pair.x, pair.y);
      }
    __syncwarp();
    T* out = static_cast<T*>(p.y) + int64_t{place.image} * p.oh * p.ow * S::kColumns + y_column;
#pragma unroll
    for (int i = lane; i < 16 * kM * kN; i += 32) {
      const int row = i / kN, piece = i % kN;
      const int oh = place.oh + (y_row + row) / kTile, ow = place.ow + (y_row + row) % kTile;
      if (oh < p.oh && ow < p.ow)
        Vec<T, 8>::load(stage + row * S::kStageRow + 8 * piece)
            .store(out + (static_cast<int64_t>(oh) * p.ow + ow) * S::kColumns + 8 * piece);
    }
  }
}

// Calls f(shape) for the shape that serves the problem, if there is one.
template <class T, class F>
bool with_shape(const FusedMBConvParams& p, F&& f) {
  const auto fits = [&](auto shape) {
    using S = decltype(shape);
    if (p.c_in != S::kIn || p.c_mid != S::kMid || p.c_out != S::kColumns) return false;
    if ((p.project != nullptr) != S::kProject || p.window.stride_h != S::kStride) return false;
    f(shape);
    return true;
  };
  return fits(Shape<T, 24, 24, 0, 1, 2, 3>()) || fits(Shape<T, 32, 32, 0, 1, 1, 3>()) ||
         fits(Shape<T, 32, 16, 0, 1, 2, 3>()) || fits(Shape<T, 16, 64, 32, 2, 2, 2>()) ||
         fits(Shape<T, 24, 96, 48, 2, 3, 1>()) || fits(Shape<T, 32, 128, 32, 1, 2, 1>()) ||
         fits(Shape<T, 32, 128, 48, 2, 2, 1>()) || fits(Shape<T, 32, 128, 64, 2, 2, 1>()) ||
         fits(Shape<T, 48, 192, 48, 1, 2, 1>());
}

// Calls f(shape) for an element of 16 bits, as above.
template <class F>
bool with_shape(const FusedMBConvParams& p, F&& f) {
  return with_type<half, bf16>(p.dtype, [&](auto element) { return with_shape<decltype(element)>(p, f); });
}

// Those of x; of a dimension with one element the stride says nothing.
struct Strides {
  int64_t n, h, w;
  explicit Strides(const FusedMBConvParams& p)
      : n(p.n == 1 ? 0 : p.x_stride[0]), h(p.h == 1 ? 0 : p.x_stride[1]), w(p.w == 1 ? 0 : p.x_stride[2]) {}
};

int64_t tiles_of(const FusedMBConvParams& p) { return p.n * ceil_div(p.oh, kTile) * ceil_div(p.ow, kTile); }

}  // namespace

bool fused_mbconv_resident_serves(const FusedMBConvParams& p, int shared_limit) {
  if (p.dtype == DType::kFloat32 || tiles_of(p) > 1 << 30) return false;
  const Window& window = p.window;
  if (window.kh != kWindow || window.kw != kWindow || window.stride_h != window.stride_w) return false;
  if (window.top >= kWindow || window.left >= kWindow) return false;
  const Strides strides(p);
  if (p.x_stride[3] != 1 || strides.h > 1 << 24 || strides.w > 1 << 24) return false;  // see Piece
  for (const int64_t stride : {strides.n, strides.h, strides.w})
    if (stride % 8 != 0) return false;
  for (const void* pointer : {p.x, p.weight, p.project, static_cast<const void*>(p.y)})
    if (!is_aligned(pointer, 16)) return false;
  bool fits = false;
  with_shape(p, [&](auto shape) { fits = decltype(shape)::kBytes <= shared_limit; });
  return fits;
}

Status launch_fused_mbconv_resident(const FusedMBConvParams& p, int shared_limit, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return {error, nullptr};
  Args args = {p, ceil_div(p.oh, kTile), ceil_div(p.ow, kTile), static_cast<int>(tiles_of(p))};
  const Strides strides(p);
  args.p.x_stride[0] = strides.n, args.p.x_stride[1] = strides.h, args.p.x_stride[2] = strides.w;
  Status status;
  with_shape(p, [&](auto shape) {
    using S = decltype(shape);
    // The system takes 1 KB for each block.
    const int of_one = std::min(S::kBlocks, (shared_limit + 1024) / (S::kBytes + 1024));
    const int64_t blocks = std::min<int64_t>(args.tiles, int64_t{multiprocessors} * of_one);
    status = launch<resident_kernel<S>>(blocks, S::kThreads, S::kBytes, stream, args);
  });
  return status;
}

}  // namespace effnet::cuda
