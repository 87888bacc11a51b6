// The whole backward of the depthwise convolution in training over [N, H, W, C], in one pass: it reads the
// output's gradient and raw map, and the input's raw map, and writes the input's gradient.
//
// With every step a block forms one row of dy = p * dz + q * (y - mean) + r in the ring. A thread's strip is
// one of input columns; every value of dy that it reads from the ring meets the same tap twice:
//
//     dx[pixel] += tap * dy    and    dtap += a[pixel] * dy
//
// so the activated input a needs no halo, is computed once in registers with its derivative, and the
// gradients of the taps stay in registers down the tile.
//
// Budget: at stride 1 it moves 8 bytes an element in 16 bits, for which an H100 at 3.35 TB/s has 70
// lane-instructions and 17 fp32 values from shared memory. A 3x3 window takes 18 of the former for products
// and 18 of the latter, a 5x5 window 50 and 22: by this count, which is no measurement, shared memory bounds
// both. What a thread takes is what fits the registers of three blocks of 128 threads without spilling (of
// two, for the large windows at stride 1 before sm_90): for a 3x3 window four channels of two columns (36
// gradients of taps), for a 5x5 two of four (50); 7x7, and C that is no multiple of these, one of four.
#include "cuda/train_depthwise.cuh"

namespace effnet::cuda {
namespace {

// Activations in place, and their derivatives; at the kinks the choice is torch's.
template <bool kExact, int kCount>
__device__ __forceinline__ void curves(int act, float (&z)[kCount], float (&slope)[kCount]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) f(z[i], slope[i]);
  };
  switch (act) {
    case kRelu:
      return each([](float& x, float& d) {
        d = x <= 0.0f ? 0.0f : 1.0f;
        x = at_least(x, 0.0f);
      });
    case kRelu6:
      return each([](float& x, float& d) {
        d = x <= 0.0f || x >= 6.0f ? 0.0f : 1.0f;
        x = at_most(at_least(x, 0.0f), 6.0f);
      });
    case kSilu:
      return each([](float& x, float& d) {
        const float s = sigmoid<kExact>(x);
        d = s * fmaf(x, 1.0f - s, 1.0f);
        x *= s;
      });
    case kHardswish:
      return each([](float& x, float& d) {
        const float inner = fmaf(x, 1.0f / 3.0f, 0.5f);
        d = x <= -3.0f ? 0.0f : x >= 3.0f ? 1.0f : inner;
        x = activate<kExact>(kHardswish, x);
      });
    default:
      return each([](float&, float& d) { d = 1.0f; });
  }
}

template <class T_, int kKernel_, int kStride_, int kChannels_>
struct Backward {
  using T = T_;
  using Params = TrainDepthwiseBackwardParams;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kChannels = kChannels_;
  // As registers allow.
  static constexpr int most_channels() { return kKernel == 3 ? 4 : kKernel == 5 ? 2 : 1; }
  static constexpr int kWidth = kKernel == 3 && kChannels == 4 ? 2 : 4;  // input columns of a thread
  static constexpr int kOpen = (kKernel + kStride - 1) / kStride;        // rows of dy that an input row sees
  static constexpr int kSlots = kOpen + 1;                               // of the ring: one is being written
  static constexpr int kHalo = (kKernel - 1) / kStride;      // columns of dy left of a strip's first
  static constexpr int kColumns = kWidth / kStride + kHalo;  // of dy that a strip sees
  static constexpr int kBatch = 3;                           // of dy that a thread forms at once
  static constexpr int kTaps = kKernel * kKernel, kSums = kTaps + 2;
  // Vectors in shared memory: the taps; scale, shift and mean, p, q and r, gate and bias of the output;
  // scale, shift, mean and rstd of the input.
  static constexpr int kOutput = kTaps, kInput = kTaps + 8, kVectors = kTaps + 12;
  // That a multiprocessor has registers for. Before sm_90 ptxas wants 225 and more for a large window, and
  // spills what it cannot have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kMinBlocks = kKernel > 3 && kStride == 1 ? 2 : 3;
#else
  static constexpr int kMinBlocks = 3;
#endif

  static __host__ __device__ int ring_columns(const Geometry& g) {
    return g.strips * kWidth / kStride + kHalo;
  }
  // In padded coordinates the input's columns and rows begin at the padding: strips and steps begin at
  // multiples of the stride.
  static int columns(const Params& p) { return p.window.left % kStride + p.w; }
  static int steps(const Params& p) {
    return (p.window.top + p.h - 1) / kStride - p.window.top / kStride + 1;
  }
};

template <class Tr>
__global__ void __launch_bounds__(kMaxThreads, Tr::kMinBlocks)
    backward_kernel(const __grid_constant__ Args<TrainDepthwiseBackwardParams> args) {
  using T = typename Tr::T;
  constexpr int kChannels = Tr::kChannels, kWidth = Tr::kWidth, kKernel = Tr::kKernel, kStride = Tr::kStride;
  constexpr bool kExact = !kIs16Bit<T>;
  using Channels = Vec<T, kChannels>;
  const TrainDepthwiseBackwardParams& p = args.p;
  const Geometry& g = args.g;
  const Tile<Tr> t(g, p);
  t.for_each_channel([&](int i, int c) {
    t.put_taps(p.weight, i, c);
    for (int k = 0; k < 3; ++k) {
      t.put(Tr::kOutput + k, i, p.norm[static_cast<int64_t>(k) * p.c + c]);
      t.put(Tr::kOutput + 3 + k, i, p.coefficients[static_cast<int64_t>(k) * p.c + c]);
    }
    for (int k = 0; k < 4; ++k) {
      const float none = k == 0 || k == 3 ? 1.0f : 0.0f;
      t.put(Tr::kInput + k, i, p.x_norm == nullptr ? none : p.x_norm[static_cast<int64_t>(k) * p.c + c]);
    }
  });

  // Padded columns; those of this thread, and the first of dy in the ring.
  const int tile_column = p.window.left / kStride * kStride + t.tile_w * g.strips * kWidth;
  const int x_column = tile_column + t.strip * kWidth - p.window.left;
  const int ring_columns = Tr::ring_columns(g);
  const int dy_column = tile_column / kStride - Tr::kHalo;
  const int slot_floats = ring_columns * t.block_channels;
  uint32_t inside = 0;  // bit i: column i of the strip is there
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (t.works && x_column + i >= 0 && x_column + i < p.w) inside |= 1u << i;
  }
  // Of its own, and not `inside != 0`: in the 3x3 window of stride 2 in bf16 ptxas (CUDA 12.8 to 13.0) turns
  // `outside || inside == 0` into outside || (bit 0 && bit 1), without the two negations. So full strips were
  // left out, and threads without a strip read past the ring. tests/test_cuda_cubins.py looks for it.
  const bool any_inside = t.works && x_column + kWidth > 0 && x_column < p.w;

  const int top_step = p.window.top / kStride;
  const int first_step = top_step + t.tile_h * g.rows;
  const int end_step = min(first_step + g.rows, (p.window.top + p.h - 1) / kStride + 1);

  float dtaps[Tr::kTaps][kChannels] = {};
  float sum[kChannels] = {}, product[kChannels] = {};
  for (int64_t n = t.first_image; n < t.end_image; ++n) {
    // The gate of the image before is not read any more: all its rows were formed before its last barrier.
    t.for_each_channel([&](int i, int c) {
      t.put(Tr::kOutput + 6, i, p.gate == nullptr ? 1.0f : p.gate[n * p.c + c]);
      t.put(Tr::kOutput + 7, i, p.bias == nullptr ? 0.0f : p.bias[n * p.c + c]);
    });
    __syncthreads();  // the vectors are there, and nobody reads the ring of the image before

    // Row `row` of dy, into its place in the ring. Outside of the map it is zero.
    const auto form = [&](int row) {
      if (!t.works) return;
      const bool there = row >= 0 && row < p.oh;
      float* const to = t.ring + (row + Tr::kSlots) % Tr::kSlots * slot_floats + t.channel;
      const int64_t map = ((n * p.oh + row) * p.ow + dy_column) * p.c + t.first_channel + t.channel;
      for (int first = t.strip; first < ring_columns; first += Tr::kBatch * g.strips) {
        Channels loaded_grad[Tr::kBatch], loaded_raw[Tr::kBatch];
        bool has[Tr::kBatch];
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          const int column = first + b * g.strips;
          has[b] = there && column < ring_columns && dy_column + column >= 0 && dy_column + column < p.ow;
          loaded_grad[b] = loaded_raw[b] = Channels::zero();
          if (!has[b]) continue;
          const int64_t at = map + static_cast<int64_t>(column) * p.c;
          if (p.grad != nullptr) loaded_grad[b] = Channels::load_constant(static_cast<const T*>(p.grad) + at);
          if (p.raw != nullptr) loaded_raw[b] = Channels::load_constant(static_cast<const T*>(p.raw) + at);
        }
        float z[Tr::kBatch * kChannels], slope[Tr::kBatch * kChannels];
        {
          float scale[kChannels], shift[kChannels];
          t.vector(Tr::kOutput, scale);
          t.vector(Tr::kOutput + 1, shift);
#pragma unroll
          for (int b = 0; b < Tr::kBatch; ++b) {
            float y[kChannels];
            loaded_raw[b].to_floats(y);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) z[b * kChannels + c] = fmaf(y[c], scale[c], shift[c]);
          }
        }
        curves<kExact>(p.act, z, slope);
        float mean[kChannels], pp[kChannels], q[kChannels], r[kChannels], gate[kChannels], bias[kChannels];
        t.vector(Tr::kOutput + 2, mean);
        t.vector(Tr::kOutput + 3, pp);
        t.vector(Tr::kOutput + 4, q);
        t.vector(Tr::kOutput + 5, r);
        t.vector(Tr::kOutput + 6, gate);
        t.vector(Tr::kOutput + 7, bias);
#pragma unroll
        for (int b = 0; b < Tr::kBatch; ++b) {
          const int column = first + b * g.strips;
          if (column >= ring_columns) continue;
          float grad[kChannels], y[kChannels], dy[kChannels];
          loaded_grad[b].to_floats(grad);
          loaded_raw[b].to_floats(y);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const float dz = fmaf(grad[c], gate[c], bias[c]) * slope[b * kChannels + c];
            dy[c] = has[b] ? fmaf(pp[c], dz, fmaf(q[c], y[c] - mean[c], r[c])) : 0.0f;
          }
          store_floats(to + column * t.block_channels, dy);
        }
      }
    };

    Channels loaded[kWidth];
    const auto load_row = [&](int row) {
      const bool there = p.x != nullptr && row >= 0 && row < p.h;
      const int64_t at = ((n * p.h + row) * p.w + x_column) * p.c + t.first_channel + t.channel;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        loaded[i] = Channels::zero();
        if (there && (inside >> i & 1)) {
          loaded[i] =
              Channels::load_constant(static_cast<const T*>(p.x) + at + static_cast<int64_t>(i) * p.c);
        }
      }
    };

    for (int row = first_step - Tr::kOpen + 1; row < first_step; ++row) form(row);
#pragma unroll 1
    for (int step = first_step; step < end_step; ++step) {
      load_row(step * kStride - p.window.top);
      form(step);
      __syncthreads();
#pragma unroll
      for (int phase = 0; phase < kStride; ++phase) {
        const int row = step * kStride + phase - p.window.top;
        if (phase > 0) load_row(row);
        if (row < 0 || row >= p.h || !any_inside) continue;
        float a[kWidth * kChannels], slope[kWidth * kChannels];
        {
          float scale[kChannels], shift[kChannels];
          t.vector(Tr::kInput, scale);
          t.vector(Tr::kInput + 1, shift);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            float x[kChannels];
            loaded[i].to_floats(x);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) a[i * kChannels + c] = fmaf(x[c], scale[c], shift[c]);
          }
        }
        curves<kExact>(p.x_act, a, slope);
#pragma unroll
        for (int i = 0; i < kWidth * kChannels; ++i) {
          if (!(inside >> (i / kChannels) & 1)) a[i] = 0.0f;
        }

        float dx[kWidth][kChannels] = {};
#pragma unroll
        for (int j = 0; j < Tr::kOpen; ++j) {
          const int kh = phase + kStride * j;
          if (kh >= kKernel) continue;
          const float* const from = t.ring + (step - j + Tr::kSlots) % Tr::kSlots * slot_floats +
                                    t.strip * (kWidth / kStride) * t.block_channels + t.channel;
          float taps[kKernel][kChannels];
#pragma unroll
          for (int kw = 0; kw < kKernel; ++kw) t.vector(kh * kKernel + kw, taps[kw]);
#pragma unroll
          for (int column = 0; column < Tr::kColumns; ++column) {
            float dy[kChannels];
            load_floats(from + column * t.block_channels, dy);
#pragma unroll
            for (int kw = 0; kw < kKernel; ++kw) {
              const int i = (column - Tr::kHalo) * kStride + kw;  // the pixel that meets dy at this tap
              if (i < 0 || i >= kWidth) continue;
#pragma unroll
              for (int c = 0; c < kChannels; ++c) {
                float& dtap = dtaps[kh * kKernel + kw][c];
                dx[i][c] = fmaf(dy[c], taps[kw][c], dx[i][c]);
                dtap = fmaf(dy[c], a[i * kChannels + c], dtap);
              }
            }
          }
        }

        float mean[kChannels], rstd[kChannels];
        t.vector(Tr::kInput + 2, mean);
        t.vector(Tr::kInput + 3, rstd);
        const int64_t at = ((n * p.h + row) * p.w + x_column) * p.c + t.first_channel + t.channel;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (!(inside >> i & 1)) continue;
          float x[kChannels];
          loaded[i].to_floats(x);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            dx[i][c] *= slope[i * kChannels + c];
            sum[c] += dx[i][c];
            product[c] = fmaf(dx[i][c], (x[c] - mean[c]) * rstd[c], product[c]);
          }
          if (p.dx != nullptr) {
            Channels::from_floats(dx[i]).store(static_cast<T*>(p.dx) + at + static_cast<int64_t>(i) * p.c);
          }
        }
      }
    }
  }

  // Sums over the block's strips, in order.
  float* const strip_sums = t.ring;  // [strips][kSums][block_channels]
  __syncthreads();
  if (t.works) {
    float* const to = strip_sums + t.strip * Tr::kSums * t.block_channels + t.channel;
#pragma unroll
    for (int k = 0; k < Tr::kTaps; ++k) store_floats(to + k * t.block_channels, dtaps[k]);
    store_floats(to + Tr::kTaps * t.block_channels, sum);
    store_floats(to + (Tr::kTaps + 1) * t.block_channels, product);
  }
  __syncthreads();
  float* const part = p.partial + t.part * Tr::kSums * p.c + t.first_channel;
  for (int i = static_cast<int>(threadIdx.x); i < Tr::kSums * t.block_channels;
       i += static_cast<int>(blockDim.x)) {
    const int k = i / t.block_channels, c = i % t.block_channels;
    if (c >= t.channels) continue;
    float total = 0;
    for (int s = 0; s < g.strips; ++s) total += strip_sums[s * Tr::kSums * t.block_channels + i];
    part[static_cast<int64_t>(k) * p.c + c] = total;
  }
}

// ---- sums ------------------------------------------------------------------------------------------------

// Adds up the parts: a column of `partial`, [parts][kSums][C], to a thread and seven others.
struct ReduceParams {
  const float* partial;
  void* dweight;   // [C][taps]; may be null
  float* moments;  // [2][C]; may be null
  int64_t parts;
  int c, taps;
};

template <class T>
__global__ void __launch_bounds__(32 * kReduceGroups) reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ double sums[kReduceGroups][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  const int64_t columns = int64_t{p.taps + 2} * p.c;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  float total = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = group; part < p.parts; part += kReduceGroups) {
      total += p.partial[part * columns + column];
    }
  }
  total = static_cast<float>(sum_of_groups(sums, lane, group, total));
  if (group > 0 || column >= columns) return;
  const int k = static_cast<int>(column / p.c);
  const int64_t c = column % p.c;
  if (k >= p.taps) {
    if (p.moments != nullptr) p.moments[int64_t{k - p.taps} * p.c + c] = total;
  } else if (p.dweight != nullptr) {
    static_cast<T*>(p.dweight)[c * p.taps + k] = from_float<T>(total);
  }
}

// ---- launcher --------------------------------------------------------------------------------------------

template <class F>
auto with_traits(const TrainDepthwiseBackwardParams& p, F&& f) {
  const bool aligned =
      is_aligned(p.grad, 16) && is_aligned(p.raw, 16) && is_aligned(p.x, 16) && is_aligned(p.dx, 16);
  return with_traits<Backward>(p, aligned, std::forward<F>(f));
}

}  // namespace

int64_t train_depthwise_backward_partial(const TrainDepthwiseBackwardParams& p) {
  if (!check_window(p.window).ok() || p.n == 0 || p.c == 0 || p.h == 0 || p.w == 0) return 0;
  return with_traits(p, [&](auto traits) {
    using Tr = decltype(traits);
    return geometry_of<Tr>(p).parts() * Tr::kSums * p.c;
  });
}

Status launch_train_depthwise_backward(const TrainDepthwiseBackwardParams& p, cudaStream_t stream) {
  const Status status = check_window(p.window);
  if (!status.ok() || p.c == 0) return status;
  int64_t parts = 0;
  if (p.n > 0 && p.h > 0 && p.w > 0) {
    const Status launched = with_traits(p, [&](auto traits) {
      using Tr = decltype(traits);
      parts = geometry_of<Tr>(p).parts();
      return launch_typed<Tr, backward_kernel<Tr>>(p, stream);
    });
    if (!launched.ok()) return launched;
  }
  const int taps = p.window.kh * p.window.kw;
  const ReduceParams reduce{p.partial, p.dweight, p.moments, parts, p.c, taps};
  const int64_t blocks = ceil_div<int64_t>(int64_t{taps + 2} * p.c, 32);
  return with_type(p.dtype, [&](auto element) {
    return launch<reduce_kernel<decltype(element)>>(blocks, 32 * kReduceGroups, 0, stream, reduce);
  });
}

}  // namespace effnet::cuda
