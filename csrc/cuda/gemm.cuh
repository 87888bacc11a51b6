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

// A block tile of kRows x kColumns over eight warps; a warp has kM x kN fragments of 16 x 8. A result has the
// same bits in every tile: it is one sum over the depth, in order.
template <int kColumns_, int kRows_ = 128>
struct BlockTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpsN = kColumns == 32 && kRows == 128 ? 1 : 2, kWarpsM = 8 / kWarpsN;
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

// Where this lane reads A and B: element offsets of the rows that ldmatrix (16-bit) or the FMAs (fp32) want
// from it.
template <class T, class Tile>
struct LaneRows {
  static constexpr bool kFma = sizeof(T) == 4;
  int offset[Tile::kM * (kFma ? 2 : 1)];
  int b_offset;

  // `offset_of(row)` is asked for rows of the block tile in A; those of B are b_stride apart.
  template <class OffsetOf>
  __device__ __forceinline__ LaneRows(OffsetOf offset_of, int b_stride) {
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
    b_offset = kFma ? (Tile::first_column() + lane % 4 * 2) * b_stride
                    : (Tile::first_column() + lane / 16 * 8 + lane % 8) * b_stride + lane / 8 % 2 * 8;
  }

  // The rows of A are a_stride apart. Two registers hold all offsets.
  __device__ __forceinline__ LaneRows(int a_stride, int b_stride)
      : LaneRows([a_stride](int row) { return row * a_stride; }, b_stride) {
    keep(offset[0]);
    keep(b_offset);
#pragma unroll
    for (int i = 1; i < Tile::kM * (kFma ? 2 : 1); ++i)
      offset[i] = offset[0] + (kFma ? 8 : 16) * i * a_stride;
  }
};

// acc += A[rows, depth] @ B[columns, depth]^T over the first `depth` > 0 and at most kDepth columns of a
// stage; what rounds depth up to 16 is there too, as zeros. `b` is the tile's first row.
template <int kDepth, class Tile, class T>
__device__ __forceinline__ void multiply(Accumulators<Tile>& acc, const T* a, const LaneRows<T, Tile>& rows,
                                         const T* b, int b_stride, int depth) {
  b += rows.b_offset;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k > 0 && k >= depth) break;
      uint32_t a_fragment[Tile::kM][4];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) ldmatrix_x4(a_fragment[m], a + rows.offset[m] + k);
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
    for (int k = 0; k < kDepth && k < depth; k += 4) {
      float4 a_fragment[Tile::kM][2];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
        a_fragment[m][0] = *reinterpret_cast<const float4*>(a + rows.offset[2 * m] + k);
        a_fragment[m][1] = *reinterpret_cast<const float4*>(a + rows.offset[2 * m + 1] + k);
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

// The pieces of 16 bytes that a thread copies of a tile [kRows, kColumns]: in the same columns, in rows that
// are kStep apart. So one address leads to all of them, and what depends on the columns is computed once. A
// power of two of threads takes a row; of 96 columns the last quarter of them has nothing.
template <class T, int kRows, int kColumns>
struct Pieces {
  static constexpr int kOfRow = kColumns / kVector<T>;
  static constexpr int kThreads = kOfRow % 3 == 0 ? kOfRow / 3 * 4 : kOfRow;  // of a row
  static constexpr int kStep = kGemmThreads / kThreads;
  static_assert(kColumns % kVector<T> == 0 && kGemmThreads % kThreads == 0);
  static constexpr int kCount = (kRows + kStep - 1) / kStep;

  // Shared memory takes 16 bytes of eight threads at a time. Of a stage these are two rows, 80 bytes apart
  // were they neighbours, which would share banks; four apart they do not.
  static __device__ __forceinline__ int first_row() {
    const int row = static_cast<int>(threadIdx.x) / kThreads;
    return kThreads == 4 ? row / 8 * 8 + row / 2 % 4 + row % 2 * 4 : row;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % kThreads * kVector<T>;
  }
  // From the tile's first element to that of the thread's first piece, for rows that are `stride` apart.
  template <class Int>
  static __device__ __forceinline__ Int offset(Int stride) {
    return first_row() * stride + column();
  }
  // Whether piece i is in the tile.
  static __device__ __forceinline__ bool has(int i) {
    return (kRows % kStep == 0 || first_row() + i * kStep < kRows) &&
           (kThreads == kOfRow || column() < kColumns);
  }
};

// Copies this thread's pieces from global to shared memory, where rows are kStride apart. `to` and `from` are
// the first piece's, the others follow `step` elements apart in global memory; counted from the first one,
// `rows` and `channels` are there, and what is not becomes zero. With kWhole, pieces begin at multiples of 16
// bytes and channels come in whole 16 bytes: then the copies are asynchronous, and belong to the group that
// the caller commits.
template <class Mine, int kStride, bool kWhole, class T>
__device__ __forceinline__ void copy_pieces(T* to, const T* from, int64_t step, int rows, int channels) {
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < Mine::kCount; ++i) {
      const bool there = i * Mine::kStep < rows && channels > 0;
      if (Mine::has(i)) cp_async_16(to + i * Mine::kStep * kStride, from + i * step, there ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Mine::kCount && Mine::has(i); ++i) {
      T piece[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        piece[j] = i * Mine::kStep < rows && j < channels ? from[j] : from_float<T>(0.0f);
      bit_cast<Vec<T, kVector<T>>>(piece).store(to);
      to += Mine::kStep * kStride;
      from += step;
    }
  }
}

// The same for all of a tile: `from` points at the first of `channels` elements of the first of `rows` rows,
// which are `stride` apart.
template <int kRows, int kColumns, int kStride, class T>
__device__ __forceinline__ void load_rows(T* shared, const T* from, int64_t stride, int rows, int channels,
                                          bool vector) {
  using Mine = Pieces<T, kRows, kColumns>;
  shared += Mine::offset(kStride);
  from += Mine::offset(stride);
  rows -= Mine::first_row();
  channels -= Mine::column();
  if (vector) {
    copy_pieces<Mine, kStride, true>(shared, from, Mine::kStep * stride, rows, channels);
  } else {
    copy_pieces<Mine, kStride, false>(shared, from, Mine::kStep * stride, rows, channels);
  }
}

// Copies [kRows, kColumns] from rows that may lie anywhere: `source(row)` points at the first of `channels`
// elements of a row, or is nullptr. `anywhere` is a global address for the copies that read nothing.
template <int kRows, int kColumns, class T, class Source>
__device__ __forceinline__ void gather_rows(T* shared, int stride, int channels, bool vector,
                                            const T* anywhere, Source source) {
  using Mine = Pieces<T, kRows, kColumns>;
  static_assert(Mine::kThreads == Mine::kOfRow);
  const int column = Mine::column();
#pragma unroll 1  // unrolled, the addresses of all copies would be kept in registers
  for (int row = Mine::first_row(); row < kRows; row += Mine::kStep) {
    T* to = shared + row * stride + column;
    const T* from = source(row);
    if (vector) {
      const bool there = from != nullptr && column < channels;
      cp_async_16(to, there ? from + column : anywhere, there ? 16 : 0);
    } else {
      T piece[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        piece[j] = from != nullptr && column + j < channels ? from[column + j] : from_float<T>(0.0f);
      bit_cast<Vec<T, kVector<T>>>(piece).store(to);
    }
  }
}

// Copies [kRows, kColumns] out of shared memory, to rows that are `stride` apart: the first `channels`
// elements of the first `rows` rows, of which `to` is the first. With `vector`, rows begin at multiples of 16
// bytes and channels come in whole 16 bytes.
template <int kRows, int kColumns, int kStride, class T>
__device__ __forceinline__ void store_rows(const T* shared, T* to, int64_t stride, int rows, int channels,
                                           bool vector) {
  if (vector) {
    using Mine = Pieces<T, kRows, kColumns>;
    shared += Mine::offset(kStride);
    to += Mine::offset(stride);
    rows -= Mine::first_row();
    if (Mine::column() >= channels) return;
#pragma unroll
    for (int i = 0; i < Mine::kCount; ++i, to += Mine::kStep * stride)
      if (Mine::has(i) && i * Mine::kStep < rows)
        Vec<T, kVector<T>>::load(shared + i * Mine::kStep * kStride).store(to);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns; i += kGemmThreads) {
      const int row = i / kColumns, channel = i % kColumns;
      if (row < rows && channel < channels) to[row * stride + channel] = shared[row * kStride + channel];
    }
  }
}

// The same to rows that may lie anywhere: `target(row)` points at the first of `channels` elements of a row,
// or is nullptr.
template <int kRows, int kColumns, class T, class Target>
__device__ __forceinline__ void scatter_rows(const T* shared, int stride, int channels, bool vector,
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

// A pipeline runs compute(step, slot) for every step in order while load(step, slot) fills the slots of the
// steps ahead. This starts it; what it leaves time for may come before run_pipeline.
template <int kStages, class Load>
__device__ __forceinline__ void start_pipeline(int steps, Load load) {
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    cp_async_commit();
  }
}

struct AsItArrives {
  __device__ __forceinline__ void operator()(int, int) const {}
};

// Runs it. arrived(step, slot) comes before compute(step, slot), when this thread sees what it has copied
// itself, and may change that. Ends with slots possibly still being read: a barrier must follow before their
// memory is reused.
template <int kStages, class Load, class Compute, class Arrived = AsItArrives>
__device__ __forceinline__ void run_pipeline(int steps, Load load, Compute compute, Arrived arrived = {}) {
  int slot = 0, free_slot = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    arrived(step, slot);
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
