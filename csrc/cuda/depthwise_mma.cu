// act(bn(depthwise_conv(x))) over [N, H, W, C] in 16 bits, and the channel sums of the result, on tensor
// cores: one read of x, one write of y.
//
// A warp works by itself, on two segments of 8 output columns (neighbours in a row, or of two images
// where rows are short) and 16 channels, and slides down the map. Input rows come through a ring in shared
// memory of its own, three or four rows ahead. A row is added to the up to kKernel output rows that it
// belongs to, whose sums wait in registers (depthwise_mma.cuh).
//
// Budget: an H100 at 3.35 TB/s issues 35 lane-instructions in the time of the 4 bytes of an element.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/depthwise_mma.cuh"

namespace effnet::cuda {
namespace {

constexpr int kWarps = 4;  // of a block, which share nothing
constexpr int kWide = 8;   // output columns of a segment

// Where the warps lie; the same for a whole launch.
struct Args {
  DepthwiseParams p;
  int groups;    // of a warp's channels, side by side
  int segments;  // that cover a row
  int bands;     // that cover a column, `rows` output rows each, a multiple of kSumRows
  int rows;
  unsigned places;  // of a warp, for each group
  unsigned turns;   // places that a warp takes one after the other, so that its weights are loaded once
  unsigned tiles;   // of all sums
};

template <class T_, int kKernel_, int kStride_, bool kVector_, bool kSilu_, int kMinBlocks_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kBlocks = 2;
  static constexpr bool kVector = kVector_;  // pixels are made of aligned 16 bytes
  static constexpr bool kSilu = kSilu_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kSegments = 2, kChannels = 8 * kBlocks;
  static constexpr int kColumns = (kWide - 1) * kStride + kKernel;  // of x that a segment reads
  static constexpr int kPixel = kChannels + 8;
  using Window = WindowRows<T, kKernel, kStride, 1, kBlocks, (kColumns + 1) / 2, kColumns * kPixel>;
  static_assert(kPixel == Window::kPixel);
  static constexpr int kRow = kSegments * kColumns * kPixel;                   // elements
  static constexpr int kStage = kStride * kRow, kRing = kStride == 1 ? 4 : 3;  // for one row of y; stages
  static constexpr int kSharedBytes = kWarps * kRing * kStage * 2;
};

// What a warp computes at a time: segments one behind the other, each with its image and its number in a row.
template <int kSegments>
struct Place {
  unsigned first;  // segment of the batch
  int image[kSegments], index[kSegments];
  int first_row;

  __device__ __forceinline__ Place(const Args& args, unsigned number) {
    first = number / args.bands * kSegments;
    first_row = static_cast<int>(number % args.bands) * args.rows;
    image[0] = static_cast<int>(first / args.segments);
    index[0] = static_cast<int>(first % args.segments);
#pragma unroll
    for (int h = 1; h < kSegments; ++h) {
      const bool next = index[h - 1] + 1 == args.segments;
      image[h] = image[h - 1] + (next ? 1 : 0);
      index[h] = next ? 0 : index[h - 1] + 1;
    }
  }
};

// Where the sums of an image's row begin, in tiles.
__device__ __forceinline__ unsigned first_tile(const Args& args, int image, int row) {
  return (image * ceil_div(args.p.oh, kSumRows) + row / kSumRows) * args.segments;
}

// One element of y.
template <class Tr>
__device__ __forceinline__ Exact exact_output(const DepthwiseParams& p, int64_t image, int row, int column,
                                              int channel) {
  using T = typename Tr::T;
  const T* const weight = static_cast<const T*>(p.weight) + int64_t{channel} * Tr::kKernel * Tr::kKernel;
  const T* const map = static_cast<const T*>(p.x) + image * p.h * p.w * p.c + channel;
  const auto value = [&](int x_row, int x_column) {
    return to_float(map[(static_cast<int64_t>(x_row) * p.w + x_column) * p.c]);
  };
  return by_taps<Tr::kKernel, Tr::kStride>(p.window, p.h, p.w, row, column, weight, p.act,
                                           bn_affine<T>(p.bn, channel), value);
}

template <class Tr>
__global__ void __launch_bounds__(kWarps * 32, Tr::kMinBlocks)
    depthwise_mma_kernel(const __grid_constant__ Args args) {
  using T = typename Tr::T;
  using Window = typename Tr::Window;
  constexpr int kStride = Tr::kStride, kBlocks = Tr::kBlocks, kSegments = Tr::kSegments;
  constexpr int kColumns = Tr::kColumns, kRow = Tr::kRow, kStage = Tr::kStage, kRing = Tr::kRing;
  constexpr int kBefore = Window::kOpen - 1;  // output rows that are open before the first one is complete
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const DepthwiseParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  T* const ring = reinterpret_cast<T*>(shared_memory) + threadIdx.x / 32 * (kRing * kStage);

  // The warp's first channel, and its place in each turn: renewed, or they and what follows from them would
  // be kept in registers all the time.
  const auto warp = [] {
    unsigned number = blockIdx.x * kWarps + threadIdx.x / 32;
    renew(number);
    return number;
  };
  const auto first_channel = [&] { return static_cast<int>(warp() % args.groups) * Tr::kChannels; };
  const auto number_of = [&](unsigned turn) { return warp() / args.groups * args.turns + turn; };
  if (number_of(0) >= args.places) return;
  const int c0 = first_channel();
  Window window(ring, p.weight, c0, p.c);
  const LaneEpilogue<T, kBlocks, Tr::kSilu> epilogue(p.bn, c0, p.c);

  // A place that has been spoilt is taken again.
  bool again = false;
#pragma unroll 1
  for (unsigned turn = 0; turn < args.turns && number_of(turn) < args.places; turn += again ? 0 : 1) {
    const bool exactly = again;
    bool spoilt = false;
    const Place<kSegments> place(args, number_of(turn));
    const int first_row = place.first_row, rows = min(args.rows, p.oh - first_row);
    cp_async_wait<0>();
    __syncwarp();  // nothing of the place before is under way or read any more

    // ---- rows into the ring ----
    const int first_x_row = first_row * kStride - p.window.top;
    const int64_t x_pitch = int64_t{p.w} * p.c, y_pitch = int64_t{p.ow} * p.c;
    const unsigned x_end = max(0, min(first_x_row + (rows - 1) * kStride + Tr::kKernel, p.h));
    constexpr int kSize = Tr::kVector ? 8 : 1;  // elements of a piece
    constexpr int kOfPixel = Tr::kChannels / kSize, kPieces = kSegments * kColumns * kOfPixel;
    constexpr int kCopies = Tr::kVector ? (kPieces + 31) / 32 : 1;  // of a lane
    // Where a piece lies in a row of x, in elements from the first segment's image on, and in a row of the
    // ring.
    const auto piece_of = [&](unsigned piece, int64_t& from, T*& to) {
      const unsigned pixel = piece / kOfPixel, channel = piece % kOfPixel * kSize;
      const int which = static_cast<int>(pixel / kColumns), column = static_cast<int>(pixel % kColumns);
      const unsigned segment = place.first + which, by_row = args.segments;
      const int image = static_cast<int>(segment / by_row), index = static_cast<int>(segment % by_row);
      const int x_column = index * (kWide * kStride) - p.window.left + column;
      from = (image - place.image[0]) * p.h * x_pitch + x_column * p.c + c0 + channel;
      to = ring + (kStride == 1 ? pixel : which * kColumns + Window::pixel_of(column)) * Tr::kPixel + channel;
      return image < p.n && x_column >= 0 && x_column < p.w && c0 + static_cast<int>(channel) < p.c &&
             piece < kPieces;
    };
    unsigned from[kCopies];  // bytes
    T* to[kCopies];
    bool copied[kCopies];
    if constexpr (Tr::kVector) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        int64_t elements;
        copied[i] = piece_of(static_cast<unsigned>(lane) + 32 * i, elements, to[i]);
        from[i] = static_cast<unsigned>(copied[i] ? elements * 2 : 0);
      }
    }
    int x_row = first_x_row;
    const T* x = static_cast<const T*>(p.x) + (int64_t{place.image[0]} * p.h + x_row) * x_pitch;
    // The next row into the ring, `slot` elements behind its beginning.
    const auto load_row = [&](int slot) {
      const bool row_there = static_cast<unsigned>(x_row) < x_end;
      if constexpr (Tr::kVector) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          if (32 * (i + 1) > kPieces && lane + 32 * i >= kPieces) continue;
          const bool there = row_there && copied[i];
          if (!exactly) {
            cp_async_16(to[i] + slot, bytes_behind(x, from[i]), there ? 16 : 0);
            continue;
          }
          auto piece = there ? Vec<T, 8>::load_constant(bytes_behind(x, from[i])) : Vec<T, 8>::zero();
          for (uint32_t& word : piece.words) word = finite_or_zero<T>(word);
          piece.store(to[i] + slot);
        }
      } else {
#pragma unroll 1
        for (int piece = lane; piece < kPieces; piece += 32) {
          int64_t at;
          T* target;
          const bool there = piece_of(piece, at, target) && row_there;
          target[slot] = there && (!exactly || is_finite(to_float(x[at]))) ? x[at] : from_float<T>(0.0f);
        }
      }
      ++x_row;
      x += x_pitch;
    };
    const auto load = [&](int slot) {
#pragma unroll
      for (int i = 0; i < kStride; ++i) load_row(slot + i * kRow);
      cp_async_commit();
    };

    // ---- where this lane writes: pixel lane / 4 of every segment ----
    const int channel = first_channel() + (Tr::kVector ? exchanged_channel() : lane % 4 * 2);
    bool there[kSegments];
    std::conditional_t<Tr::kVector, unsigned, int64_t>
        y_at[kSegments];  // bytes from the first segment's image on
    T* y = static_cast<T*>(p.y) + (int64_t{place.image[0]} * p.oh + first_row) * y_pitch;
#pragma unroll
    for (int h = 0; h < kSegments; ++h) {
      const int column = place.index[h] * kWide + lane / 4;
      there[h] = place.image[h] < p.n && column < p.ow;
      y_at[h] = ((place.image[h] - place.image[0]) * p.oh * y_pitch + int64_t{column} * p.c + channel) * 2;
    }
    // Sums lie in the order [image, kSumRows rows, segment]: where those of this place's segments begin.
    unsigned tiles[kSegments];
#pragma unroll
    for (int h = 0; h < kSegments; ++h)
      tiles[h] = first_tile(args, place.image[h], first_row) + place.index[h];

    // ---- down the map ----
    float total[kSegments][kBlocks][2] = {};
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) load(i * kStage);
    int slot = 0, free_slot = (kRing - 1) * kStage;
#pragma unroll 1
    for (int done = -kBefore; done < rows; ++done) {
      cp_async_wait<kRing - 2>();
      __syncwarp();  // the rows are there for all lanes, and none reads the free slot any more
      load(free_slot);
      float z[1][kBlocks][4];
#pragma unroll
      for (int i = 0; i < kStride; ++i) window.add(i, slot + i * kRow);
#pragma unroll
      for (int i = 0; i < kBlocks * 4; ++i) z[0][i / 4][i % 4] = window.open[kBefore][0][i / 4][i % 4];
      free_slot = slot;
      slot = slot == (kRing - 1) * kStage ? 0 : slot + kStage;

      if (done < 0) continue;
      epilogue.apply(p.act, z);
#pragma unroll
      for (int h = 0; h < kSegments; ++h) {
        const auto at = [&](int b, int e) { return z[0][b][2 * h + e]; };
        const float count = there[h] ? 1.0f : 0.0f;  // where it is not, what is not finite spoils the sum
#pragma unroll
        for (int i = 0; i < kBlocks * 2; ++i)
          total[h][i / 2][i % 2] = fmaf(at(i / 2, i % 2), count, total[h][i / 2][i % 2]);
        if constexpr (Tr::kVector) {
#pragma unroll
          for (int b = 0; b < kBlocks; b += 2) {
            const Vec<T, 4> four = exchange<T>(at(b, 0), at(b, 1), at(b + 1, 0), at(b + 1, 1));
            if (there[h] && channel + 8 * b < p.c) four.store(bytes_behind(y, y_at[h]) + 8 * b);
          }
        } else if (there[h]) {
#pragma unroll
          for (int i = 0; i < kBlocks * 2; ++i) {
            const int further = 8 * (i / 2) + i % 2;
            if (channel + further < p.c) y[y_at[h] / 2 + further] = from_float<T>(at(i / 2, i % 2));
          }
        }
      }
      y += y_pitch;

      if ((done + 1) % kSumRows != 0 && done + 1 < rows) continue;
#pragma unroll
      for (int h = 0; h < kSegments; ++h)
        if (is_spoilt(total[h])) spoilt = true;
      if (p.sums != nullptr) store_sums(p.sums, tiles, args.tiles, first_channel(), p.c, total);
#pragma unroll
      for (int h = 0; h < kSegments; ++h) {
        tiles[h] += args.segments;
#pragma unroll
        for (int i = 0; i < kBlocks * 2; ++i) total[h][i / 2][i % 2] = 0;
      }
    }

    // ---- the second time: windows with what is not finite, tap by tap ----
    again = spoilt && !exactly;
    if (!exactly) continue;
    __syncwarp();  // global memory: other lanes have stored what is stored again
    const Place<kSegments> here(args, number_of(turn));
    const int end_row = min(here.first_row + args.rows, p.oh);
#pragma unroll 1
    for (int first = here.first_row; first < end_row; first += kSumRows) {
#pragma unroll 1
      for (unsigned h = 0; h < kSegments; ++h) {
        const unsigned segment = here.first + h, by_row = args.segments;
        const int image = static_cast<int>(segment / by_row), index = static_cast<int>(segment % by_row);
        const int column = index * kWide + lane / 4;
        float sums[1][kBlocks][2] = {};
        unsigned spoilt = 0;  // bits of channels
#pragma unroll 1
        for (int row = first; row < min(first + kSumRows, end_row) && image < p.n && column < p.ow; ++row)
#pragma unroll
          for (int j = 0; j < 2 * kBlocks; ++j) {
            const int c = first_channel() + 8 * (j / 2) + lane % 4 * 2 + j % 2;
            if (c >= p.c) continue;
            const Exact exact = exact_output<Tr>(p, image, row, column, c);
            sums[0][j / 2][j % 2] += exact.value;
            if (!exact.spoils) continue;
            spoilt |= 1u << j;
            static_cast<T*>(p.y)[((int64_t{image} * p.oh + row) * p.ow + column) * p.c + c] =
                from_float<T>(exact.value);
          }
        const unsigned tile[1] = {first_tile(args, image, first) + index};
        if (p.sums != nullptr)
          store_sums(p.sums, tile, args.tiles, first_channel(), p.c, sums, of_segment(spoilt));
      }
    }
  }
}

// ---- launcher --------------------------------------------------------------------------------------------

template <class T, int kKernel, int kStride, bool kVector, bool kSilu>
struct Choose {
  static constexpr int kMinBlocks = kKernel == 3 ? (kVector ? 4 : 3) : kKernel == 5 ? 3 : 2;
  using type = Traits<T, kKernel, kStride, kVector, kSilu, kMinBlocks>;
};

template <class Tr>
Status launch_typed(const DepthwiseParams& p, cudaStream_t stream) {
  Args args{p, ceil_div(p.c, Tr::kChannels), ceil_div(p.ow, kWide), 0, kMaxRows, 0, 1, 0};
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return {error, nullptr};
  // Long columns re-read fewer rows, short ones make more warps: two rounds of them, if there can be. Where
  // there are more, a warp takes several places.
  const int64_t round = int64_t{multiprocessors} * Tr::kMinBlocks * kWarps;
  const int64_t across = ceil_div<int64_t>(p.n * args.segments, Tr::kSegments);
  while (args.rows > kSumRows && across * args.groups * ceil_div(p.oh, args.rows) < 2 * round) args.rows /= 2;
  args.bands = ceil_div(p.oh, args.rows);
  const int64_t places = across * args.bands;
  const int64_t tiles = p.n * depthwise_mma_tiles(p);
  if (tiles > INT32_MAX || places * args.groups > INT32_MAX)
    return {cudaErrorInvalidValue, "the map has too many elements for one launch"};
  args.tiles = static_cast<unsigned>(tiles);
  args.places = static_cast<unsigned>(places);
  args.turns = static_cast<unsigned>(std::max<int64_t>(1, ceil_div(places * args.groups, round)));
  const int64_t warps = ceil_div<int64_t>(places, args.turns) * args.groups;
  return launch<depthwise_mma_kernel<Tr>>(ceil_div<int64_t>(warps, kWarps), kWarps * 32, Tr::kSharedBytes,
                                          stream, args);
}

}  // namespace

int depthwise_mma_tiles(const DepthwiseParams& p) { return ceil_div(p.oh, kSumRows) * ceil_div(p.ow, kWide); }

Status launch_depthwise_mma(const DepthwiseParams& p, cudaStream_t stream) {
  return with_window<half, bf16>(p.dtype, p.window, [&](auto element, auto kernel, auto stride) {
    constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
    const auto with = [&](auto vector, auto silu) {
      using Chosen =
          Choose<decltype(element), kKernel, kStride, decltype(vector)::value, decltype(silu)::value>;
      return launch_typed<typename Chosen::type>(p, stream);
    };
    // Offsets within the images of a warp are 32 bit there.
    const int64_t image = std::max(int64_t{p.h} * p.w, int64_t{p.oh} * p.ow) * p.c * 2;
    using Yes = std::true_type;
    using No = std::false_type;
    if (p.c % 8 != 0 || !is_aligned(p.x, 16) || !is_aligned(p.y, 8) || image > UINT32_MAX / 4)
      return p.act == kSilu ? with(No(), Yes()) : with(No(), No());
    return p.act == kSilu ? with(Yes(), Yes()) : with(Yes(), No());
  });
}

}  // namespace effnet::cuda
