// The matrix product of a block, C[rows, columns] = A[rows, depth] @ B[columns, depth]^T, in pieces that the
// kernels put together: rows copied into shared memory in a pipeline, the product of a warp, who owns which
// result.
//
// Both operands have their depth (input channels) contiguous, in memory and in shared memory, as NHWC maps
// and [out, in] weights do. Rows in shared memory are an odd multiple of 16 bytes apart: the eight 16-byte
// rows that ldmatrix reads at a time then lie in eight different groups of banks, and so do the pairs that an
// epilogue writes from a fragment.
//
// 16-bit types multiply on tensor cores (m16n8k16, fp32 sums). fp32 has no matrix instruction of its own
// precision: it takes FMAs, with results owned by the same threads, so kernels need no second version.
#pragma once

#include <initializer_list>

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace effnet::cuda {

constexpr int kGemmThreads = 256;

// One stage of a pipeline holds 64 bytes of depth per row.
template <class T>
struct Stage {
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kStride = 80 / sizeof(T);  // elements from row to row
};

// A block tile of 128 rows and kColumns columns over eight warps; a warp has kM x kN fragments of 16 x 8.
template <int kColumns_>
struct BlockTile {
  static constexpr int kRows = 128, kColumns = kColumns_;
  static constexpr int kWarpsN = kColumns == 32 ? 1 : 2, kWarpsM = 8 / kWarpsN;
  static constexpr int kM = kRows / (16 * kWarpsM), kN = kColumns / (8 * kWarpsN);

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / kWarpsN * (16 * kM); }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % kWarpsN * (8 * kN); }
};

template <class Tile>
using Accumulators = float[Tile::kM][Tile::kN][4];

template <class Tile>
__device__ __forceinline__ void clear(Accumulators<Tile>& acc) {
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
}

// Calls visit(row, column, a, b) for every pair of results of this thread, columns `column` and `column + 1`
// of the block tile; a and b may be written.
template <class Tile, class Visit>
__device__ __forceinline__ void for_each_pair(Accumulators<Tile>& acc, Visit visit) {
  const int row = Tile::first_row() + threadIdx.x % 32 / 4;
  const int column = Tile::first_column() + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        visit(row + 16 * m + 8 * half, column + 8 * n, acc[m][n][2 * half], acc[m][n][2 * half + 1]);
}

// acc = act(acc * scale + shift), with the affine maps of the block tile's columns in shared memory.
template <class Tile, bool kExact>
__device__ __forceinline__ void batch_norm_act(Accumulators<Tile>& acc, const Affine* affine, int act) {
  for_each_pair<Tile>(acc, [&](int, int column, float& a, float& b) {
    const Affine left = affine[column], right = affine[column + 1];
    a = fmaf(a, left.scale, left.shift);
    b = fmaf(b, right.scale, right.shift);
  });
  activate<kExact>(act, reinterpret_cast<float (&)[Tile::kM * Tile::kN * 4]>(acc));
}

// The affine maps of `columns` channels from `first` on; zeros from `channels` on.
template <class T>
__device__ __forceinline__ void load_affine(Affine* affine, const BatchNorm& bn, int first, int columns,
                                            int channels) {
  for (int i = threadIdx.x; i < columns; i += kGemmThreads)
    affine[i] = first + i < channels ? bn_affine<T>(bn, first + i) : Affine{0.0f, 0.0f};
}

// Two neighbours in shared memory.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float a, float b) {
  const float pair[2] = {a, b};
  Vec<T, 2>::from_floats(pair).store(to);
}

template <class T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  float pair[2];
  Vec<T, 2>::load(from).to_floats(pair);
  return {pair[0], pair[1]};
}

// Where this lane reads A: element offsets of the rows that ldmatrix (16-bit) or the FMAs (fp32) want from
// it. `offset_of(row)` is asked for rows of the block tile.
template <class T, class Tile>
struct LaneRows {
  static constexpr bool kFma = sizeof(T) == 4;
  int offset[Tile::kM * (kFma ? 2 : 1)];

  template <class OffsetOf>
  __device__ __forceinline__ explicit LaneRows(OffsetOf offset_of) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
      const int row = Tile::first_row() + 16 * m;
      if constexpr (kFma) {
        offset[2 * m] = offset_of(row + lane / 4);
        offset[2 * m + 1] = offset_of(row + lane / 4 + 8);
      } else {
        offset[m] = offset_of(row + lane % 16) + lane / 16 * 8;
      }
    }
  }
};

// A prologue that leaves A as it is; see multiply.
struct NoPrologue {
  template <class Fragment>
  __device__ __forceinline__ void operator()(Fragment&, int, int) const {}
};

// acc += A[128, depth] @ B[columns, depth]^T over the first `depth` and at most kDepth columns of a stage;
// what rounds depth up to 16 is there too, as zeros. `b` is the tile's first row. prologue(fragment, m, k)
// may change what was read of A: for 16-bit types the four registers of mma's first operand at depth k, for
// fp32 two float4, rows lane / 4 and lane / 4 + 8 of the fragment m, at depths k to k + 3.
template <int kDepth, class Tile, class T, class Prologue>
__device__ __forceinline__ void multiply(Accumulators<Tile>& acc, const T* a, const LaneRows<T, Tile>& rows,
                                         const T* b, int b_stride, int depth, Prologue prologue) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    b += (Tile::first_column() + lane / 16 * 8 + lane % 8) * b_stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k >= depth) break;
      uint32_t a_fragment[Tile::kM][4];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
        ldmatrix_x4(a_fragment[m], a + rows.offset[m] + k);
        prologue(a_fragment[m], m, k);
      }
#pragma unroll
      for (int n = 0; n < Tile::kN; n += 2) {
        uint32_t fragment[4];
        ldmatrix_x4(fragment, b + 8 * n * b_stride + k);
        const uint32_t left[2] = {fragment[0], fragment[1]}, right[2] = {fragment[2], fragment[3]};
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) {
          mma_m16n8k16<T>(acc[m][n], a_fragment[m], left);
          mma_m16n8k16<T>(acc[m][n + 1], a_fragment[m], right);
        }
      }
    }
  } else {
    b += (Tile::first_column() + lane % 4 * 2) * b_stride;
    for (int k = 0; k < kDepth && k < depth; k += 4) {
      float4 a_fragment[Tile::kM][2];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
        a_fragment[m][0] = *reinterpret_cast<const float4*>(a + rows.offset[2 * m] + k);
        a_fragment[m][1] = *reinterpret_cast<const float4*>(a + rows.offset[2 * m + 1] + k);
        prologue(a_fragment[m], m, k);
      }
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 w = *reinterpret_cast<const float4*>(b + (8 * n + i) * b_stride + k);
#pragma unroll
          for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float4 x = a_fragment[m][half];
              float& sum = acc[m][n][2 * half + i];
              sum = fmaf(x.x, w.x, sum);
              sum = fmaf(x.y, w.y, sum);
              sum = fmaf(x.z, w.z, sum);
              sum = fmaf(x.w, w.w, sum);
            }
        }
    }
  }
}

// Copies [kRows, kDepth] into shared memory. `source(row)` points at the first of `channels` elements of a
// row, or is nullptr; what is not there becomes zero. With `vector`, sources are multiples of 16 bytes and
// channels come in whole 16 bytes: then the copies are asynchronous, and belong to the group that the caller
// commits. `anywhere` is a global address for the copies that read nothing.
template <int kRows, int kDepth, class T, class Source>
__device__ __forceinline__ void load_rows(T* shared, int stride, int channels, bool vector, const T* anywhere,
                                          Source source) {
  if (vector) {
    constexpr int kChunks = kDepth / kVector<T>;
#pragma unroll 1  // unrolled, the addresses of all copies would be kept in registers
    for (int i = threadIdx.x; i < kRows * kChunks; i += kGemmThreads) {
      const int row = i / kChunks, channel = i % kChunks * kVector<T>;
      const T* from = source(row);
      const bool there = from != nullptr && channel < channels;
      cp_async_16(shared + row * stride + channel, there ? from + channel : anywhere, there ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kDepth; i += kGemmThreads) {
      const int row = i / kDepth, channel = i % kDepth;
      const T* from = source(row);
      shared[row * stride + channel] =
          from != nullptr && channel < channels ? from[channel] : from_float<T>(0.0f);
    }
  }
}

// Copies [kRows, kColumns] out of shared memory. `target(row)` points at the first of `channels` elements of
// a row, or is nullptr. With `vector`, targets are multiples of 16 bytes and channels come in whole 16 bytes.
template <int kRows, int kColumns, class T, class Target>
__device__ __forceinline__ void store_rows(const T* shared, int stride, int channels, bool vector,
                                           Target target) {
  if (vector) {
    constexpr int kChunks = kColumns / kVector<T>;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kChunks; i += kGemmThreads) {
      const int row = i / kChunks, channel = i % kChunks * kVector<T>;
      T* to = target(row);
      if (to != nullptr && channel < channels)
        Vec<T, kVector<T>>::load(shared + row * stride + channel).store(to + channel);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns; i += kGemmThreads) {
      const int row = i / kColumns, channel = i % kColumns;
      T* to = target(row);
      if (to != nullptr && channel < channels) to[channel] = shared[row * stride + channel];
    }
  }
}

// Runs compute(step, slot) for every step in order while load(step, slot) fills the slots of the steps ahead.
// Ends with slots possibly still being read: a barrier must follow before their memory is reused.
template <int kStages, class Load, class Compute>
__device__ __forceinline__ void pipeline(int steps, Load load, Compute compute) {
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    cp_async_commit();
  }
  int slot = 0, free_slot = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step's copies of all threads are there, and nobody reads the free slot any more
    if (step + kStages - 1 < steps) load(step + kStages - 1, free_slot);
    cp_async_commit();
    compute(step, slot);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
  }
}

// ---- host code -------------------------------------------------------------------------------------------

// Whether rows of `channels` elements at these addresses (null: not given) are made of aligned 16 bytes.
template <class T>
bool rows_of_16_bytes(int64_t channels, std::initializer_list<const void*> addresses) {
  bool aligned = channels % kVector<T> == 0;
  for (const void* address : addresses) aligned = aligned && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  return aligned;
}

}  // namespace effnet::cuda
