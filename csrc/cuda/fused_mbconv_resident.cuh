// What fused_mbconv_resident.cu works on: a tile's layout in shared memory, the copies of x into it, the
// weights that stay, and the products of a tile's windows with them.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace effnet::cuda {
namespace {

constexpr int kWindow = 3, kTaps = kWindow * kWindow;
constexpr int kTile = 8, kPixels = kTile * kTile;  // output pixels of a team
constexpr int kRows = 32;                          // output pixels of a warp: two fragments of 16

struct Args {
  FusedMBConvParams p;
  int tiles_h, tiles_w, tiles;
};

// Elements from row to row so that the eight rows that ldmatrix reads at a time lie in different banks.
constexpr int odd_vectors(int elements) { return elements / 8 % 2 == 1 ? elements : elements + 8; }

// kOut_ is 0 without a projection: then y is the expanded map.
template <class T_, int kIn_, int kMid_, int kOut_, int kStride_, int kTeams_, int kBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kIn = kIn_, kMid = kMid_, kOut = kOut_, kStride = kStride_;
  static constexpr int kTeams = kTeams_;    // of a block
  static constexpr int kBlocks = kBlocks_;  // for which a multiprocessor has registers
  static constexpr bool kProject = kOut > 0;
  static constexpr int kColumns = kProject ? kOut : kMid;  // of y
  static constexpr int kDepth = kTaps * kIn;               // K
  static constexpr int kHaloRows = (kTile - 1) * kStride + kWindow;
  static constexpr int kOdd = (kHaloRows + 1) / 2;  // at stride 2 odd columns lie behind the even ones
  static constexpr int kPixel = odd_vectors(kIn);   // elements from pixel to pixel
  static constexpr int kHalo = kHaloRows * kHaloRows * kPixel;
  static constexpr int kPieces = kHaloRows * kHaloRows * kIn / 8;  // of 16 bytes, of the halo
  static constexpr int kTable = (kPieces + 1) / 2 * 2;
  static constexpr int kWeightRow = odd_vectors(kDepth), kProjectRow = odd_vectors(kMid);

  static constexpr int kSplit = kProject || kMid > 24 ? 2 : 1;  // warps that share pixels
  static constexpr int kTeamWarps = kPixels / kRows * kSplit;
  static constexpr int kTeamThreads = 32 * kTeamWarps;
  static constexpr int kThreads = kTeams * kTeamThreads;
  static constexpr int kBuffers = kProject ? 1 : 2;  // of a team's halo
  static constexpr int kN = kMid / 8 / kSplit;       // fragments of 8 expanded channels of a warp
  static constexpr int kOutN = kOut / 8;             // fragments of 8 outputs

  // Shared memory, in elements: weights, projection, halos, what warps exchange; and affine maps.
  static constexpr int kWeights = kProject ? kMid * kWeightRow : 0;
  static constexpr int kProjects = kOut * kProjectRow;
  static constexpr int kStageRow = odd_vectors(kProject ? kOut : 8 * kN);
  static constexpr int kStage =  // of a warp: half of the sums of 16 pixels, or its part of y
      std::max(16 * kOut / 2 * 2, (kProject ? 16 : kRows) * kStageRow);
  static constexpr int kBytes = (kMid + kOut) * static_cast<int>(sizeof(Affine)) + kTable * 8 +
                                (kWeights + kProjects + kTeams * (kBuffers * kHalo + kTeamWarps * kStage)) *
                                    static_cast<int>(sizeof(T));
  static_assert(2 * kHalo < 1 << 16, "see Piece");
  static_assert(kIn % 8 == 0 && kMid % (8 * kSplit) == 0 && kOut % 16 == 0 && (!kProject || kN % 2 == 0));

  // Elements of the halo before a pixel.
  static __host__ __device__ constexpr int pixel_at(int row, int column) {
    return (row * kHaloRows + (kStride == 1 ? column : column % 2 * kOdd + column / 2)) * kPixel;
  }

  // Eight channels of K, from the lane's pixel, in the halo.
  static constexpr int offset_of(int vector) {
    const int tap = vector / (kIn / 8);
    return pixel_at(tap / kWindow, tap % kWindow) + vector % (kIn / 8) * 8;
  }
};

// Where a team's tile lies.
struct Place {
  int image, oh, ow;

  __device__ __forceinline__ Place(const Args& args, int tile) {
    const int row = tile / args.tiles_w;
    image = row / args.tiles_h;
    oh = row % args.tiles_h * kTile;
    ow = tile % args.tiles_w * kTile;
  }
};

// Eight channels of a halo: where they are in x and in shared memory, in bytes from its first pixel on, their
// row and column.
struct __align__(8) Piece {
  int from;
  uint32_t to_row_column;  // 16, 8 and 8 bits
};

template <class S>
__device__ __forceinline__ Piece piece_of(const FusedMBConvParams& p, int i) {
  const int pixel = i / (S::kIn / 8), channel = i % (S::kIn / 8) * 8;
  const int row = pixel / S::kHaloRows, column = pixel % S::kHaloRows;
  const int to = 2 * (S::pixel_at(row, column) + channel);
  return {2 * (static_cast<int>(row * p.x_stride[1] + column * p.x_stride[2]) + channel),
          static_cast<uint32_t>(to | row << 16 | column << 24)};
}

// Starts copying the pixels of x under a tile, with zeros around the map.
template <class S>
__device__ __forceinline__ void load_halo(typename S::T* halo, const Args& args, const Piece* pieces,
                                          const Place& place) {
  const FusedMBConvParams& p = args.p;
  const int h0 = place.oh * S::kStride - p.window.top, w0 = place.ow * S::kStride - p.window.left;
  const bool inside = h0 >= 0 && w0 >= 0 && h0 + S::kHaloRows <= p.h && w0 + S::kHaloRows <= p.w;
  char* const to = reinterpret_cast<char*>(halo);
  const char* const x = static_cast<const char*>(p.x);
  const char* const from = x + 2 * (place.image * p.x_stride[0] + h0 * p.x_stride[1] + w0 * p.x_stride[2]);
  const auto load = [&](auto checked) {
#pragma unroll
    for (int j = 0; j < ceil_div(S::kPieces, S::kTeamThreads); ++j) {
      const int i = j * S::kTeamThreads + threadIdx.x % S::kTeamThreads;
      if (i >= S::kPieces) break;
      const uint2 words = *reinterpret_cast<const uint2*>(pieces + i);
      const Piece piece = {static_cast<int>(words.x), words.y};
      const int h = h0 + static_cast<int>(piece.to_row_column >> 16 & 0xff);
      const int w = w0 + static_cast<int>(piece.to_row_column >> 24);
      const bool there = !decltype(checked)::value || (0 <= h && h < p.h && 0 <= w && w < p.w);
      cp_async_16(to + (piece.to_row_column & 0xffff), there ? from + piece.from : x, there ? 16 : 0);
    }
  };
  inside ? load(std::false_type()) : load(std::true_type());
  cp_async_commit();
}

// The weights of a warp's channels in shared memory: fragments of B for 16 values of K, and for the last 8 of
// an odd number.
template <class S>
struct SharedWeights {
  const typename S::T *steps, *last_step;

  __device__ __forceinline__ SharedWeights(const typename S::T* weight, int first) {
    const int lane = threadIdx.x % 32;
    steps = weight + (first + lane / 16 * 8 + lane % 8) * S::kWeightRow + lane / 8 % 2 * 8;
    last_step = weight + first * S::kWeightRow + S::kDepth - 8;
  }

  __device__ __forceinline__ void step(int k, uint32_t (&b)[S::kN][2]) const {
#pragma unroll
    for (int n = 0; n < S::kN; n += 2) {
      uint32_t two[4];
      ldmatrix_x4(two, steps + 8 * n * S::kWeightRow + 16 * k);
      b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
    }
  }

  __device__ __forceinline__ void last(uint32_t (&b)[S::kN]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < S::kN; n += 4) {
      uint32_t four[4];
      const int row = 8 * n + lane;
      ldmatrix_x4(four, last_step + (row < 8 * S::kN ? row : 0) * S::kWeightRow);
#pragma unroll
      for (int i = 0; i < 4 && n + i < S::kN; ++i) b[n + i] = four[i];
    }
  }
};

// The same in registers, straight from memory.
template <class S>
struct RegisterWeights {
  uint32_t pairs[S::kDepth / 8][S::kN];

  __device__ __forceinline__ RegisterWeights(const void* weight, int first) {
    const int lane = threadIdx.x % 32;
    const uint32_t* from =
        static_cast<const uint32_t*>(weight) + ((first + lane / 4) * S::kDepth) / 2 + lane % 4;
#pragma unroll
    for (int k = 0; k < S::kDepth / 8; ++k)
#pragma unroll
      for (int n = 0; n < S::kN; ++n) pairs[k][n] = from[(8 * n * S::kDepth + 8 * k) / 2];
  }

  __device__ __forceinline__ void step(int k, uint32_t (&b)[S::kN][2]) const {
#pragma unroll
    for (int n = 0; n < S::kN; ++n) b[n][0] = pairs[2 * k][n], b[n][1] = pairs[2 * k + 1][n];
  }

  __device__ __forceinline__ void last(uint32_t (&b)[S::kN]) const {
#pragma unroll
    for (int n = 0; n < S::kN; ++n) b[n] = pairs[S::kDepth / 8 - 1][n];
  }
};

// acc += the windows of this warp's pixels. `pixel` is what this lane names to ldmatrix under the first tap:
// a pixel of the first fragment, and of 16 values of K the lower or the upper 8.
template <class S, class Weights>
__device__ __forceinline__ void add_windows(float (&acc)[2][S::kN][4], const typename S::T* pixel,
                                            const Weights& weights) {
  using T = typename S::T;
  constexpr int kVectors = S::kDepth / 8, kSecond = 16 / kTile * S::kStride * S::kHaloRows * S::kPixel;
  const int upper = threadIdx.x % 32 / 16;  // whether this lane names the upper 8
#pragma unroll
  for (int k = 0; k < kVectors / 2; ++k) {
    uint32_t a[2][4], b[S::kN][2];
    constexpr auto beyond = [](int k) { return S::offset_of(2 * k + 1) - S::offset_of(2 * k) - 8; };
    const T* const from = pixel + S::offset_of(2 * k) + (beyond(k) == 0 ? 0 : upper * beyond(k));
#pragma unroll
    for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], from + m * kSecond);
    weights.step(k, b);
#pragma unroll
    for (int n = 0; n < S::kN; ++n)
#pragma unroll
      for (int m = 0; m < 2; ++m) mma_m16n8k16<T>(acc[m][n], a[m], b[n]);
  }
  if constexpr (kVectors % 2 == 1) {
    uint32_t a[4], b[S::kN];
    // Here the upper lanes name the second fragment.
    ldmatrix_x4(a, pixel + S::offset_of(kVectors - 1) + upper * (kSecond - 8));
    weights.last(b);
#pragma unroll
    for (int n = 0; n < S::kN; ++n)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t rows[2] = {a[2 * m], a[2 * m + 1]};
        mma_m16n8k8<T>(acc[m][n], rows, b[n], acc[m][n]);
      }
  }
}

}  // namespace
}  // namespace effnet::cuda
