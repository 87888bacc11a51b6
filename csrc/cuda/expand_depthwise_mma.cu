// expand_depthwise in 16 bits: the first two convolutions of an MBConv, of whose expanded map there is never
// more than one row of a strip.
//
// Designed for e (P_in C_in + P_out C_mid) bytes from and to DRAM, element size e; the expanded map, e P_in
// C_mid written and read, is what it saves. x is read from the L2 once for every 48 or 64 expanded channels.
//
// A block has a strip of up to 16 kM output columns, a band of output rows and 16 expanded channels for each
// of its warps, and goes down the map one row of x at a time, which comes through a ring in shared memory. A
// warp
//   1. expands the row: products with weights that stay in registers, BatchNorm, activation, rounded to the
//   type of
//      the map, into a row of its own in shared memory. The padding around the map is zero there, not
//      act(bn(0));
//   2. adds it to the output rows that it belongs to, whose sums wait in registers (depthwise_mma.cuh).
// So nothing is expanded twice but what two strips or two bands share.
#include <algorithm>
#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/depthwise_mma.cuh"
#include "cuda/gemm.cuh"

namespace effnet::cuda {
namespace {

constexpr int kRing = 3;    // rows of x in shared memory
constexpr int kSteps = 4;   // of 8 input channels, at most
constexpr int kBlocks = 2;  // of 8 expanded channels, of a warp
constexpr int kOfWarp = 8 * kBlocks;
constexpr int kMostWarps = 4;

// Where the blocks lie; the same for a whole launch.
struct Args {
  ExpandDepthwiseParams p;
  bool vector_in, vector_out;  // pixels are made of aligned 16 bytes of x, of 8 of y
  int slices;                  // blocks side by side that cover the expanded channels
  int strips, width;           // that cover a row; output columns of each
  int bands, rows;             // that cover a column; output rows of each, a multiple of kSumRows
  int pixels, pitch;           // of a row of x in the ring; elements from one to the next
};

template <class T_, int kM_, bool kSilu_>
struct Traits {
  using T = T_;
  static constexpr int kKernel = 3, kStride = 2, kM = kM_;
  static constexpr bool kSilu = kSilu_;
  static constexpr int kMinBlocks = 3;                                // as registers allow
  static constexpr int kColumns = (16 * kM - 1) * kStride + kKernel;  // expanded, that a strip reads
  static constexpr int kPixel = kOfWarp + 8;
  // Four more than a multiple of eight: pairs of neighbouring columns are then stored into different banks.
  static constexpr int kOdd = (kColumns / 2 + 4) / 8 * 8 + 4;
  static_assert(kOdd >= (kColumns + 1) / 2);
  using Window = WindowRows<T, kKernel, kStride, kM, kBlocks, kOdd, 8 * kPixel>;
  static constexpr int kMap = (kOdd + kColumns / 2) * kPixel;  // elements
};

// One element of y.
template <class Tr>
__device__ __forceinline__ Exact exact_output(const ExpandDepthwiseParams& p, int64_t image, int row,
                                              int column, int channel) {
  using T = typename Tr::T;
  const T* const weight = static_cast<const T*>(p.weight) + int64_t{channel} * Tr::kKernel * Tr::kKernel;
  const T* const expand_weight = static_cast<const T*>(p.expand_weight) + int64_t{channel} * p.c_in;
  const T* const map = static_cast<const T*>(p.x) + image * p.h * p.w * p.c_in;
  const Affine expand_bn = bn_affine<T>(p.expand_bn, channel);
  const auto value = [&](int x_row, int x_column) {
    const T* const x = map + (static_cast<int64_t>(x_row) * p.w + x_column) * p.c_in;
    float sum = 0;
#pragma unroll 1
    for (int c = 0; c < p.c_in; ++c) sum = fmaf(to_float(x[c]), to_float(expand_weight[c]), sum);
    return to_float(from_float<T>(finish(p.act, sum, expand_bn)));
  };
  return by_taps<Tr::kKernel, Tr::kStride>(p.window, p.h, p.w, row, column, weight, p.act,
                                           bn_affine<T>(p.bn, channel), value);
}

template <class Tr>
__global__ void __launch_bounds__(kMostWarps * 32, Tr::kMinBlocks)
    expand_depthwise_mma_kernel(const __grid_constant__ Args args) {
  using T = typename Tr::T;
  using Window = typename Tr::Window;
  constexpr int kStride = Tr::kStride, kM = Tr::kM, kPixel = Tr::kPixel, kOpen = Window::kOpen;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const ExpandDepthwiseParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, threads = static_cast<int>(blockDim.x);
  const int ring_row = args.pixels * args.pitch;
  T* const ring = reinterpret_cast<T*>(shared_memory);
  T* const map = ring + kRing * ring_row + warp * Tr::kMap;

  unsigned block = blockIdx.x;
  const int c0 = (static_cast<int>(block % args.slices) * (threads / 32) + warp) * kOfWarp;
  block /= args.slices;
  const int strip = static_cast<int>(block % args.strips);
  block /= args.strips;
  const int first_row = static_cast<int>(block % args.bands) * args.rows;
  const int64_t image = block / args.bands;
  const int rows = min(args.rows, p.oh - first_row);
  const int first_column = strip * args.width, columns = min(args.width, p.ow - first_column);
  // Columns of x that there are under the strip's windows, and where the first of them lies in a row of the
  // map.
  const int left = first_column * kStride - p.window.left;
  const int x_column = max(left, 0),
            pixels = min(left + (columns - 1) * kStride + Tr::kKernel, p.w) - x_column;

  // ---- weights and BatchNorm, in registers ----
  // Of the expansion lane 4g + t has input channels 2t and 2t + 1 of every eight, for expanded channel g of a
  // block.
  uint32_t expand_weight[kSteps][kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int channel = c0 + 8 * b + g;
    const uint16_t* const of_channel =
        static_cast<const uint16_t*>(p.expand_weight) + int64_t{channel} * p.c_in;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int c = 8 * step + 2 * t;
      const bool first = channel < p.c_mid && c < p.c_in, second = channel < p.c_mid && c + 1 < p.c_in;
      expand_weight[step][b] =
          (first ? of_channel[c] : 0u) | (second ? uint32_t{of_channel[c + 1]} << 16 : 0u);
    }
  }
  const LaneEpilogue<T, kBlocks, Tr::kSilu> expand_epilogue(p.expand_bn, c0, p.c_mid);
  Window window(map, p.weight, c0, p.c_mid);
  const LaneEpilogue<T, kBlocks, Tr::kSilu> epilogue(p.bn, c0, p.c_mid);

  // ---- rows of x into the ring ----
  const int first_x_row = first_row * kStride - p.window.top;
  const int x_end = min(first_x_row + (rows - 1) * kStride + Tr::kKernel, p.h);
  const int pieces = ceil_div(p.c_in, 8);  // of 16 bytes, of a pixel
  const T* const x = static_cast<const T*>(p.x) + (image * p.h * p.w + x_column) * p.c_in;
  const int piece_step = threads % pieces, pixel_step = threads / pieces;
  const auto load = [&](int row, int slot) {
    if (row >= 0 && row < x_end) {
      const T* const from = x + static_cast<int64_t>(row) * p.w * p.c_in;
      if (args.vector_in) {
        int pixel = static_cast<int>(threadIdx.x) / pieces, piece = static_cast<int>(threadIdx.x) % pieces;
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < pixels * pieces; i += threads) {
          cp_async_16(ring + slot + pixel * args.pitch + piece * 8, from + i * 8);
          piece += piece_step;
          pixel += pixel_step;
          if (piece >= pieces) piece -= pieces, ++pixel;
        }
      } else {
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < pixels * pieces * 8; i += threads) {
          const int pixel = i / (pieces * 8), c = i % (pieces * 8);
          ring[slot + pixel * args.pitch + c] = c < p.c_in ? from[pixel * p.c_in + c] : from_float<T>(0.0f);
        }
      }
    }
    cp_async_commit();
  };

  // ---- the warp's row of the map ----
  const auto clear_map = [&] {
    for (int i = lane; i < Tr::kMap / 2; i += 32) reinterpret_cast<uint32_t*>(map)[i] = 0;
  };
  bool exactly = false;  // the second time
  // Pixels g and g + 8 of a tile of x, channels 2t and 2t + 1; 16 columns further it is 16 / kStride pixels.
  T* const map_at = map + Window::pixel_of(x_column - left + g) * kPixel + 2 * t;
  constexpr int kEight = 8 / kStride * kPixel;
  const int row_at = (lane % 16) * args.pitch;
  const auto expand = [&](int slot) {
#pragma unroll 1
    for (int tile = 0; tile < pixels; tile += 32) {
      float z[2][kBlocks][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        if (8 * step >= p.c_in) break;
        const bool whole = 8 * (step + 1) < p.c_in;  // both halves of 16 channels are there
        const T* const from =
            ring + slot + row_at + tile * args.pitch + 8 * step + (whole ? lane / 16 * 8 : 0);
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], from + 16 * m * args.pitch);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            if (whole) {
              const uint32_t both[2] = {expand_weight[step][b], expand_weight[step + 1][b]};
              mma_m16n8k16<T>(z[m][b], a[m], both);
            } else {
              const uint32_t half[2] = {a[m][0], a[m][1]};
              mma_m16n8k8<T>(z[m][b], half, expand_weight[step][b], z[m][b]);
            }
          }
      }
      expand_epilogue.apply(p.act, z);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (tile + 8 * i + g >= pixels) continue;
        T* const to = map_at + tile / 8 * kEight + i * kEight;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Vec<T, 2> pair = {{pack<T>(z[i / 2][b][i % 2 * 2], z[i / 2][b][i % 2 * 2 + 1])}};
          if (exactly) pair.words[0] = finite_or_zero<T>(pair.words[0]);
          pair.store(to + 8 * b);
        }
      }
    }
  };

  // ---- where this lane writes ----
  const int channel = c0 + (args.vector_out ? exchanged_channel() : 2 * t);
  T* const first_y =
      static_cast<T*>(p.y) + ((image * p.oh + first_row) * p.ow + first_column + g) * p.c_mid + channel;
  const auto store = [&](int row, const float (&total)[1][kBlocks][2], unsigned wanted = kWholeWarp) {
    const int64_t row_of_tiles = image * ceil_div(p.oh, kSumRows) + row / kSumRows;
    const unsigned tile[1] = {static_cast<unsigned>(row_of_tiles * args.strips + strip)};
    if (p.sums != nullptr) store_sums(p.sums, tile, UINT32_MAX, c0, p.c_mid, total, wanted);
  };

  // ---- down the map; a second time where something has been spoilt ----
  bool spoilt = false;
#pragma unroll 1
  do {
    exactly = spoilt;
    int x_row = first_x_row;
    T* y = first_y;
    clear_map();  // zeros stay where x has no column, and rows above it are zeros
    float total[1][kBlocks][2] = {};
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) load(x_row + i, i * ring_row);
    int slot = 0, free_slot = (kRing - 1) * ring_row;
#pragma unroll 1
    for (int step = 0; step < rows + kOpen - 1; ++step) {
#pragma unroll
      for (int phase = 0; phase < kStride; ++phase) {
        cp_async_wait<kRing - 2>();
        __syncthreads();  // the row is there for all warps, and none reads the free slot or its row of the
                          // map any more
        load(x_row + kRing - 1, free_slot);
        if (x_row >= 0 && x_row < x_end) {
          expand(slot);
        } else if (x_row >= x_end) {
          clear_map();
        }
        ++x_row;
        __syncwarp();
        window.add(phase, 0);
        free_slot = slot;
        slot = slot == (kRing - 1) * ring_row ? 0 : slot + ring_row;
      }

      const int row = step - (kOpen - 1);
      if (row < 0) continue;
      float z[kM][kBlocks][4];
#pragma unroll
      for (int i = 0; i < kM * kBlocks * 4; ++i)
        z[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] =
            window.open[kOpen - 1][i / 4 / kBlocks][i / 4 % kBlocks][i % 4];
      epilogue.apply(p.act, z);
#pragma unroll
      for (int h = 0; h < 2 * kM; ++h) {
        const auto at = [&](int b, int e) { return z[h / 2][b][h % 2 * 2 + e]; };
        const bool there = 8 * h + g < columns;
        const float count =
            there ? 1.0f : 0.0f;  // where it is not, a result that is not finite spoils the sum
#pragma unroll
        for (int i = 0; i < kBlocks * 2; ++i)
          total[0][i / 2][i % 2] = fmaf(at(i / 2, i % 2), count, total[0][i / 2][i % 2]);
        T* const to = y + int64_t{8 * h} * p.c_mid;
        if (args.vector_out) {
          const Vec<T, 4> four = exchange<T>(at(0, 0), at(0, 1), at(1, 0), at(1, 1));
          if (there && channel < p.c_mid) four.store(to);
        } else if (there) {
#pragma unroll
          for (int i = 0; i < kBlocks * 2; ++i) {
            const int further = 8 * (i / 2) + i % 2;
            if (channel + further < p.c_mid) to[further] = from_float<T>(at(i / 2, i % 2));
          }
        }
      }
      y += static_cast<int64_t>(p.ow) * p.c_mid;

      if ((row + 1) % kSumRows != 0 && row + 1 != rows) continue;
      spoilt |= is_spoilt(total[0]);
      store(first_row + row, total);
#pragma unroll
      for (int i = 0; i < kBlocks * 2; ++i) total[0][i / 2][i % 2] = 0;
    }

    cp_async_wait<0>();
    spoilt = __syncthreads_or(spoilt);
  } while (spoilt && !exactly);

  // ---- the second time: windows with what is not finite, tap by tap ----
  if (!exactly) return;
#pragma unroll 1
  for (int first = first_row; first < first_row + rows; first += kSumRows) {
    float sums[1][kBlocks][2] = {};
    unsigned of_channels = 0;
#pragma unroll 1
    for (int row = first; row < min(first + kSumRows, first_row + rows); ++row)
#pragma unroll 1
      for (int column = g; column < columns; column += 8)
#pragma unroll
        for (int j = 0; j < 2 * kBlocks; ++j) {
          const int c = c0 + 8 * (j / 2) + 2 * t + j % 2;
          if (c >= p.c_mid) continue;
          const Exact exact = exact_output<Tr>(p, image, row, first_column + column, c);
          sums[0][j / 2][j % 2] += exact.value;
          if (!exact.spoils) continue;
          of_channels |= 1u << j;
          static_cast<T*>(p.y)[((image * p.oh + row) * p.ow + first_column + column) * p.c_mid + c] =
              from_float<T>(exact.value);
        }
    store(first, sums, of_segment(of_channels));
  }
}

// ---- launcher --------------------------------------------------------------------------------------------

// Calls f(type of the traits) for strips that fit the width of y.
template <class T, bool kSilu, class F>
auto with_traits(const ExpandDepthwiseParams& p, F&& f) {
  return p.ow <= 32 ? f(Traits<T, 2, kSilu>()) : f(Traits<T, 4, kSilu>());
}

int groups_of(const ExpandDepthwiseParams& p) { return ceil_div(p.c_mid, kOfWarp); }

// Of a block: MBConvs expand to four or six times a multiple of eight channels, so that all have work.
int warps_of(const ExpandDepthwiseParams& p) {
  return groups_of(p) % 4 == 0 || groups_of(p) % 3 != 0 ? kMostWarps : kMostWarps - 1;
}

template <class Tr>
Args args_of(const ExpandDepthwiseParams& p) {
  Args args{p, false, false, 0, 0, 0, 0, kMaxRows, 0, 0};
  args.slices = ceil_div(groups_of(p), warps_of(p));
  args.strips = ceil_div(p.ow, 16 * Tr::kM);
  args.width = ceil_div(p.ow, args.strips);
  // Tiles of 32 pixels are read.
  args.pixels = ceil_div(std::min((args.width - 1) * Tr::kStride + Tr::kKernel, p.w), 32) * 32;
  args.pitch = (ceil_div(p.c_in, 8) / 2 * 2 + 1) * 8;
  return args;
}

template <class Tr>
int shared_bytes_of(const ExpandDepthwiseParams& p) {
  const Args args = args_of<Tr>(p);
  return (kRing * args.pixels * args.pitch + warps_of(p) * Tr::kMap) * 2;
}

template <class Tr>
Status launch_typed(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan, cudaStream_t stream) {
  Args args = args_of<Tr>(p);
  args.vector_in = rows_of_16_bytes<typename Tr::T>(p.c_in, {p.x});
  args.vector_out = p.c_mid % 8 == 0 && is_aligned(p.y, 8);
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return {error, nullptr};
  if (p.n * plan.tiles > INT32_MAX)
    return {cudaErrorInvalidValue, "the map has too many elements for one launch"};
  // Long columns expand fewer rows twice, short ones make more blocks: two rounds of them, if there can be.
  const int64_t across = p.n * args.strips * args.slices;
  while (args.rows > kSumRows && across * ceil_div(p.oh, args.rows) < int64_t{6} * multiprocessors)
    args.rows /= 2;
  args.bands = ceil_div(p.oh, args.rows);
  return launch<expand_depthwise_mma_kernel<Tr>>(across * args.bands, warps_of(p) * 32, plan.shared_bytes,
                                                 stream, args);
}

}  // namespace

ExpandDepthwisePlan expand_depthwise_mma_plan(const ExpandDepthwiseParams& p, int shared_limit) {
  ExpandDepthwisePlan plan;
  if (p.window.kh != 3 || p.window.stride_h != 2 || p.c_in > 8 * kSteps) {
    plan.unsupported = "two kernels are faster but for 3x3 windows at stride 2 and up to 32 input channels";
    return plan;
  }
  with_traits<half, true>(p, [&](auto traits) {
    using Tr = decltype(traits);
    plan.shared_bytes = shared_bytes_of<Tr>(p);
    plan.tiles = ceil_div(p.oh, kSumRows) * args_of<Tr>(p).strips;
  });
  if (plan.shared_bytes > shared_limit) plan.unsupported = "a row of x does not fit into shared memory";
  return plan;
}

Status launch_expand_depthwise_mma(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan,
                                   cudaStream_t stream) {
  return with_type<half, bf16>(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto start = [&](auto traits) { return launch_typed<decltype(traits)>(p, plan, stream); };
    return p.act == kSilu ? with_traits<T, true>(p, start) : with_traits<T, false>(p, start);
  });
}

}  // namespace effnet::cuda
