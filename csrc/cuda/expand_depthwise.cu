// expand_depthwise in fp32: the first two convolutions of an MBConv, with the expanded map between them in
// shared memory only. 16 bits go to expand_depthwise_mma.cu.
//
// Designed for 4 (P_in C_in + P_out C_mid) bytes from and to DRAM; the expanded map, 4 P_in C_mid written and
// read, is what it saves. Blocks that share a strip of x are neighbours in the grid, one per slice of 32
// expanded channels, so x is read once from DRAM and once per slice from the L2.
//
// A block owns a strip of output rows of one image and full width (where whole maps fit, a whole map; where
// they are smaller than a tile of the GEMM, several images), and one slice of channels:
//   1. GEMM: 128 pixels by the slice at a time, BatchNorm, activation, into shared memory. Rows of x that two
//   strips
//      need are expanded in both.
//   2. Depthwise: a walker of half as many lanes as channels goes along an output row with two channels a
//      lane. The taps' weights stay in registers, each input column is read once per output row and added to
//      the outputs that it touches, and an output leaves when its last column has been seen. The padding lies
//      around the expanded map and is zero, not act(bn(0)): its positions are skipped. Columns and rows are
//      the same for a whole walker, so no tap is tested for the padding on its own.
//
// 256 threads, at most 128 registers; the plan takes the largest strip with which two blocks fit on a
// multiprocessor.
#include <algorithm>

#include "cuda/gemm.cuh"

namespace effnet::cuda {
namespace {

using T = float;
constexpr int kStages = 2;
constexpr int kChannels = 32;  // of a slice

struct Args {
  ExpandDepthwiseParams p;
  bool vector_in, pair_out;  // rows of x and weight are made of aligned 16 bytes; of y, of pairs
  int rows, tiles, images;   // output rows of a strip, strips of an image, images of a block
  int segments;              // into which an output row is cut for the walkers
  int slices;
};

struct Shared {
  using Tile = BlockTile<kChannels>;
  static constexpr int kStage = (Tile::kRows + kChannels) * Stage<T>::kStride;  // elements
  static constexpr int kStride = kChannels + kVector<T>;  // elements between expanded pixels
  static constexpr int kWalkers = kGemmThreads / (kChannels / 2);

  // Two affine maps, taps [kernel^2][kChannels], stages (later the walkers' sums), the expanded map.
  static int64_t bytes(int kernel, int64_t pixels) {
    static_assert(kWalkers * kChannels * sizeof(float) <= kStages * kStage * sizeof(T));
    return 2 * kChannels * sizeof(Affine) + kernel * kernel * kChannels * sizeof(float) +
           kStages * kStage * sizeof(T) + pixels * kStride * sizeof(T);
  }
};

// One row of outputs, columns [first, last), for two channels: emit(a, b) for one after the other.
// `rows[i]` is the expanded row under the taps' row i at column 0, nullptr in the padding; its pixels are
// kPixel elements apart. kFast: with a copy of the code for the inside of the map that tests nothing.
template <int kPixel, int kKernel, int kStrideW, bool kFast, class Emit>
__device__ __forceinline__ void walk(const T* const (&rows)[kKernel], int width, int left, int first,
                                     int last, const float2 (&taps)[kKernel * kKernel], Emit emit) {
  constexpr int kOpen = (kKernel + kStrideW - 1) / kStrideW;  // outputs that a column can touch
  constexpr int kPeriod = kOpen * kStrideW;  // after which an output's place comes round again
  constexpr int kLast = kKernel - 1;
  static_assert(kPeriod > kLast);
  float2 open[kOpen] = {};
  const int columns = (last - 1 - first) * kStrideW + kKernel, start = first * kStrideW - left;
  bool whole = true;  // no row is padding
#pragma unroll
  for (int i = 0; i < kKernel; ++i) whole = whole && rows[i] != nullptr;
  int base = 0;
  // kInside: every column of the period is in the map, and ends an output if its place in the period does.
  const auto period = [&](auto inside) {
    constexpr bool kInside = decltype(inside)::value;
    const T* at[kKernel];
#pragma unroll
    for (int i = 0; i < kKernel; ++i) at[i] = rows[i] + (start + base) * kPixel;
#pragma unroll
    for (int j = 0; j < kPeriod; ++j) {
      if (!kInside && base + j >= columns) break;
      const int column = start + base + j;
      if (j % kStrideW == 0) open[j / kStrideW] = {0.0f, 0.0f};  // its first column
      if (kInside || (0 <= column && column < width)) {
        float2 in[kKernel];
#pragma unroll
        for (int i = 0; i < kKernel; ++i)
          in[i] = kInside || rows[i] != nullptr ? load_pair(at[i] + j * kPixel) : float2{0.0f, 0.0f};
#pragma unroll
        for (int tap = 0; tap < kKernel; ++tap) {
          if ((j + kPeriod * kKernel - tap) % kStrideW != 0) continue;
          float2& sum = open[(j + kPeriod * kKernel - tap) / kStrideW % kOpen];
#pragma unroll
          for (int i = 0; i < kKernel; ++i) {
            sum.x = fmaf(in[i].x, taps[i * kKernel + tap].x, sum.x);
            sum.y = fmaf(in[i].y, taps[i * kKernel + tap].y, sum.y);
          }
        }
      }
      if ((j + kPeriod * kKernel - kLast) % kStrideW == 0 && (kInside || base + j >= kLast)) {
        const float2 sum = open[(j + kPeriod * kKernel - kLast) / kStrideW % kOpen];
        emit(sum.x, sum.y);
      }
    }
  };
  for (; base < columns; base += kPeriod) {
    if (kFast && whole && base > 0 && start + base >= 0 && start + base + kPeriod <= width &&
        base + kPeriod <= columns) {
      period(std::true_type());
    } else {
      period(std::false_type());
    }
  }
}

template <int kKernel, int kStrideW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    expand_depthwise_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  using S = Shared;
  using Tile = S::Tile;
  constexpr int kDepth = Stage<T>::kDepth, kStride = Stage<T>::kStride;
  Affine* expand_affine = reinterpret_cast<Affine*>(shared_memory);
  Affine* affine = expand_affine + kChannels;
  float* taps = reinterpret_cast<float*>(affine + kChannels);
  T* stages = reinterpret_cast<T*>(taps + kKernel * kKernel * kChannels);
  T* expanded = stages + kStages * S::kStage;
  const ExpandDepthwiseParams& p = args.p;
  const T* x = static_cast<const T*>(p.x);
  const T* expand_weight = static_cast<const T*>(p.expand_weight);
  const T* weight = static_cast<const T*>(p.weight);

  const int c0 = static_cast<int>(blockIdx.x % args.slices) * kChannels;
  const int tile = static_cast<int>(blockIdx.x / args.slices % args.tiles);
  const int64_t image0 = static_cast<int64_t>(blockIdx.x / args.slices / args.tiles) * args.images;
  const int images = static_cast<int>(p.n - image0 < args.images ? p.n - image0 : args.images);
  const int oh0 = tile * args.rows, oh1 = oh0 + args.rows < p.oh ? oh0 + args.rows : p.oh;
  const int ih0 = max(0, oh0 * kStrideW - p.window.top);
  // Of several images all rows, also those below the last window: they lie one behind the other in x.
  const int ih1 = args.images > 1 ? p.h : min(p.h, (oh1 - 1) * kStrideW - p.window.top + kKernel);
  const int map_pixels = max(0, ih1 - ih0) * p.w;  // of one image
  const int pixels = images * map_pixels;

  load_affine<T>(expand_affine, p.expand_bn, c0, kChannels, p.c_mid);
  load_affine<T>(affine, p.bn, c0, kChannels, p.c_mid);
  for (int i = threadIdx.x; i < kKernel * kKernel * kChannels; i += kGemmThreads) {
    const int channel = i / (kKernel * kKernel), tap = i % (kKernel * kKernel);
    taps[tap * kChannels + channel] =
        c0 + channel < p.c_mid ? to_float(weight[static_cast<int64_t>(c0) * kKernel * kKernel + i]) : 0.0f;
  }

  // ---- expand ----
  const T* strip = x + (image0 * p.h + ih0) * p.w * p.c_in;
  const LaneRows<T, Tile> lane_rows(kStride, kStride);
  Accumulators<Tile> acc;
  clear<Tile>(acc);
  int loaded_row = 0, loaded_k = 0;
  const auto load = [&](int, int slot) {
    T* a = stages + slot * S::kStage;
    load_rows<Tile::kRows, kDepth, kStride>(a, strip + static_cast<int64_t>(loaded_row) * p.c_in + loaded_k,
                                            p.c_in, pixels - loaded_row, p.c_in - loaded_k, args.vector_in);
    load_rows<kChannels, kDepth, kStride>(a + Tile::kRows * kStride,
                                          expand_weight + static_cast<int64_t>(c0) * p.c_in + loaded_k,
                                          p.c_in, p.c_mid - c0, p.c_in - loaded_k, args.vector_in);
    loaded_k += kDepth;
    if (loaded_k >= p.c_in) {
      loaded_k = 0;
      loaded_row += Tile::kRows;
    }
  };
  int row0 = 0, k0 = 0;
  const auto compute = [&](int, int slot) {
    const T* a = stages + slot * S::kStage;
    if (row0 + Tile::first_row() < pixels)  // the warp has rows in the strip
      multiply<kDepth, Tile>(acc, a, lane_rows, a + Tile::kRows * kStride, kStride, p.c_in - k0);
    k0 += kDepth;
    if (k0 < p.c_in) return;
    batch_norm_act<Tile, true>(acc, expand_affine, p.act);
    for_each_pair<Tile>(acc, [&](int row, int column, float a, float b) {
      if (row0 + row < pixels) store_pair(expanded + (row0 + row) * S::kStride + column, a, b);
    });
    clear<Tile>(acc);
    k0 = 0;
    row0 += Tile::kRows;
  };
  const int steps = ceil_div(pixels, Tile::kRows) * ceil_div(p.c_in, kDepth);
  start_pipeline<kStages>(steps, load);
  run_pipeline<kStages>(steps, load, compute);
  __syncthreads();

  // ---- depthwise ----
  const int channel = static_cast<int>(threadIdx.x) % (kChannels / 2) * 2;
  const int walker = static_cast<int>(threadIdx.x) / (kChannels / 2);
  float2 tap[kKernel * kKernel];
#pragma unroll
  for (int i = 0; i < kKernel * kKernel; ++i) tap[i] = load_pair(taps + i * kChannels + channel);
  const Affine first = affine[channel], second = affine[channel + 1];
  const int there =
      p.c_mid - (c0 + channel);  // of this thread's channels: one, two or more; none where not positive
  const int segment = ceil_div(p.ow, args.segments), tasks = (oh1 - oh0) * args.segments;
  float* partial = reinterpret_cast<float*>(stages);  // [walkers, channels]
  const auto depthwise =
      [&](auto silu) {  // the one activation that is worth a copy of the code without a switch
        constexpr bool kSiluOnly = decltype(silu)::value;
        for (int image = 0; image < images; ++image) {
          const T* map = expanded + image * map_pixels * S::kStride + channel;
          float2 total = {0.0f, 0.0f};
          for (int task = walker; task < tasks && there > 0; task += S::kWalkers) {
            const int oh = oh0 + task / args.segments, ow = task % args.segments * segment;
            if (ow >= p.ow) continue;
            const T* rows[kKernel];
#pragma unroll
            for (int i = 0; i < kKernel; ++i) {
              const int ih = oh * kStrideW - p.window.top + i;
              rows[i] = 0 <= ih && ih < p.h ? map + (ih - ih0) * p.w * S::kStride : nullptr;
            }
            T* y =
                static_cast<T*>(p.y) + (((image0 + image) * p.oh + oh) * p.ow + ow) * p.c_mid + c0 + channel;
            walk<S::kStride, kKernel, kStrideW, kSiluOnly>(
                rows, p.w, p.window.left, ow, min(ow + segment, p.ow), tap, [&](float a, float b) {
                  float value[2] = {fmaf(a, first.scale, first.shift), fmaf(b, second.scale, second.shift)};
                  activate<true>(kSiluOnly ? kSilu : p.act, value);
                  total.x += value[0];
                  total.y += value[1];
                  if (args.pair_out) {
                    store_pair(y, value[0], value[1]);
                  } else {
                    y[0] = from_float<T>(value[0]);
                    if (there > 1) y[1] = from_float<T>(value[1]);
                  }
                  y += p.c_mid;
                });
          }
          if (p.sums != nullptr) {  // over the walkers, in order
            store_pair(partial + walker * kChannels + channel, total.x, total.y);
            __syncthreads();
            for (int i = threadIdx.x; i < kChannels && c0 + i < p.c_mid; i += kGemmThreads) {
              float sum = 0.0f;
              for (int w = 0; w < S::kWalkers; ++w) sum += partial[w * kChannels + i];
              p.sums[((image0 + image) * args.tiles + tile) * p.c_mid + c0 + i] = sum;
            }
            __syncthreads();
          }
        }
      };
  if (p.act == kSilu) {
    depthwise(std::true_type());
  } else {
    depthwise(std::false_type());
  }
}

// The strip with the most rows that takes at most `limit` bytes; no rows where not even one fits.
ExpandDepthwisePlan strip_within(const ExpandDepthwiseParams& p, int limit) {
  using S = Shared;
  const auto bytes = [&](int rows) {
    const int64_t in =
        std::min<int64_t>(p.h, static_cast<int64_t>(rows - 1) * p.window.stride_h + p.window.kh);
    return S::bytes(p.window.kh, in * p.w);
  };
  ExpandDepthwisePlan plan;
  int rows = 0;
  while (rows < p.oh && bytes(rows + 1) <= limit) ++rows;
  if (rows == 0) return plan;
  plan.tiles = ceil_div(p.oh, rows);
  plan.rows = ceil_div(p.oh, plan.tiles);
  plan.images = 1;
  const int64_t pixels = static_cast<int64_t>(p.h) * p.w;
  if (plan.tiles == 1) {
    const int64_t tile = BlockTile<kChannels>::kRows;
    while ((plan.images + 1) * pixels <= tile && S::bytes(p.window.kh, (plan.images + 1) * pixels) <= limit)
      ++plan.images;
  }
  plan.shared_bytes =
      static_cast<int>(plan.images > 1 ? S::bytes(p.window.kh, plan.images * pixels) : bytes(plan.rows));
  // Expanded rows over rows, and idle channels: what the block computes over what is wanted.
  const double expanded =
      static_cast<double>(plan.tiles) *
      std::min<int64_t>(p.h, static_cast<int64_t>(plan.rows - 1) * p.window.stride_h + p.window.kh);
  plan.overhead = std::max(1.0, expanded / p.h) * ceil_div(p.c_mid, kChannels) * kChannels / p.c_mid;
  return plan;
}

// How many pieces of an output row let the walkers finish first.
int segments_of_row(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan) {
  const int walkers = Shared::kWalkers;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int segments = 1; segments <= 8 && segments <= p.ow; ++segments) {
    const int64_t columns =
        static_cast<int64_t>(ceil_div(p.ow, segments) - 1) * p.window.stride_w + p.window.kw;
    const int64_t time = ceil_div<int64_t>(static_cast<int64_t>(plan.rows) * segments, walkers) * columns;
    if (time < least) {
      least = time;
      best = segments;
    }
  }
  return best;
}

template <int kKernel, int kStrideW>
Status launch_kernel(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan, cudaStream_t stream) {
  const Args args = {p,
                     rows_of_16_bytes<T>(p.c_in, {p.x, p.expand_weight}),
                     p.c_mid % 2 == 0 && reinterpret_cast<uintptr_t>(p.y) % (2 * sizeof(T)) == 0,
                     plan.rows,
                     plan.tiles,
                     plan.images,
                     segments_of_row(p, plan),
                     ceil_div(p.c_mid, kChannels)};
  const int64_t blocks = ceil_div<int64_t>(p.n, plan.images) * plan.tiles * args.slices;
  return launch<expand_depthwise_kernel<kKernel, kStrideW>>(blocks, kGemmThreads, plan.shared_bytes, stream,
                                                            args);
}

}  // namespace

ExpandDepthwisePlan expand_depthwise_plan(const ExpandDepthwiseParams& p, int shared_limit) {
  ExpandDepthwisePlan plan;
  const Window& window = p.window;
  if (window.kh != window.kw || (window.kh != 3 && window.kh != 5)) {
    plan.unsupported = "only 3x3 and 5x5 kernels";
  } else if (window.stride_h != window.stride_w || window.stride_h > 2) {
    plan.unsupported = "only strides (1, 1) and (2, 2)";
  } else if (p.h == 0 || p.w == 0 || p.oh == 0 || p.ow == 0 || p.c_in == 0 || p.c_mid == 0) {
    plan.unsupported = "the map is empty";
  } else if (p.dtype != DType::kFloat32) {
    plan = expand_depthwise_mma_plan(p, shared_limit);
  } else {
    plan = strip_within(p, shared_limit / 2 - 1024);  // two blocks; the system takes 1 KB for each
    if (plan.rows == 0 || plan.overhead > 1.5) {
      const ExpandDepthwisePlan alone = strip_within(p, shared_limit);
      if (plan.rows == 0 || alone.overhead * 1.25 < plan.overhead) plan = alone;
    }
    if (plan.rows == 0) {
      plan.unsupported = "not one row of the expanded map fits into shared memory";
    } else if (plan.overhead > 2) {
      plan.unsupported =
          "so little of the expanded map fits into shared memory that most of it would be computed twice";
    }
  }
  return plan;
}

Status launch_expand_depthwise(const ExpandDepthwiseParams& p, const ExpandDepthwisePlan& plan,
                               cudaStream_t stream) {
  if (plan.unsupported != nullptr) return {cudaErrorInvalidValue, plan.unsupported};
  if (p.n == 0) return {};
  if (p.dtype != DType::kFloat32) return launch_expand_depthwise_mma(p, plan, stream);
  if (p.window.kh == 3)
    return p.window.stride_h == 1 ? launch_kernel<3, 1>(p, plan, stream)
                                  : launch_kernel<3, 2>(p, plan, stream);
  return p.window.stride_h == 1 ? launch_kernel<5, 1>(p, plan, stream) : launch_kernel<5, 2>(p, plan, stream);
}

}  // namespace effnet::cuda
