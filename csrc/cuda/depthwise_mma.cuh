// The depthwise convolution of a warp on tensor cores, in 16 bits, row by row: what depthwise_mma.cu and
// expand_depthwise_mma.cu share.
//
// A window's row is a matrix product: 16 pixels by (tap, channel) times (tap, channel) by 8 channels, where
// the second factor has a tap's weights on a diagonal and zeros elsewhere. So an mma does the work of 64 FMAs
// of a lane with seven eighths of its products zero, which tensor cores have to spare: for a 5x5 window, 12.5
// mma.m16n8k16 for 128 outputs, those of an H200 were busy 37% of the time. What comes out is laid out as
// NHWC is.
//
// Zero times infinity is NaN: a value that is not finite spoils its neighbours in the product. That shows in
// the sums of the outputs. Then a kernel does the same once more, exactly: with zeros for such values, so
// that all others get the bits that they always get, and tap by tap where a window has one.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common.cuh"

namespace effnet::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kSumRows = 8;   // output rows that one partial sum covers: the same whatever rows a warp takes
constexpr int kMaxRows = 32;  // output rows of a warp

// Windows over kM tiles of 16 output pixels and kBlocks * 8 channels. Pixels are kPixel elements apart in
// shared memory, an odd multiple of 16 bytes; with stride 2 the odd columns lie kOdd pixels behind the even
// ones: so the eight pixels that ldmatrix reads at a time are neighbours, in different banks. The second
// eight pixels of a tile begin kHalf elements behind the first eight, the next tile 2 * kHalf.
template <class T_, int kKernel_, int kStride_, int kM_, int kBlocks_, int kOdd_, int kHalf_>
struct WindowRows {
  using T = T_;
  static constexpr int kKernel = kKernel_, kStride = kStride_, kM = kM_, kBlocks = kBlocks_;
  static constexpr int kOdd = kOdd_, kHalf = kHalf_;
  static constexpr int kChannels = 8 * kBlocks, kPixel = kChannels + 8;
  static constexpr int kOpen = (kKernel + kStride - 1) / kStride;  // output rows that an input row adds to
  static constexpr int kPairs = kKernel / 2;                       // of neighbouring taps; one is left over
  static_assert(kBlocks % 2 == 0 && kKernel % 2 == 1);

  // Pixels from column 0 to `column`, in shared memory.
  static __host__ __device__ constexpr int pixel_of(int column) {
    return kStride == 1 ? column : column / 2 + column % 2 * kOdd;
  }

  // Lane 4g + t holds rows (channels) 2t and 2t + 1 of column (channel) g: of a diagonal, something where one
  // of them is g.
  uint32_t taps[kBlocks][kKernel][kKernel];
  // Row `step - j` of the output is open as open[j], pixels g and g + 8, channels 2t and 2t + 1.
  float open[kOpen][kM][kBlocks][4];
  const T *pairs, *last;  // where this lane's ldmatrix reads, for the first pair of taps and for the last tap

  // `map`: shared memory, column 0 of the windows; weight [channels, kKernel, kKernel].
  __device__ __forceinline__ WindowRows(const T* map, const void* weight, int first_channel, int channels) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int channel = first_channel + 8 * b + g;
      const bool diagonal = g / 2 == t && channel < channels;
      const uint16_t* of_channel =
          static_cast<const uint16_t*>(weight) + int64_t{channel} * kKernel * kKernel;
#pragma unroll
      for (int i = 0; i < kKernel * kKernel; ++i)
        taps[b][i / kKernel][i % kKernel] = diagonal ? uint32_t{of_channel[i]} << 16 * (g % 2) : 0u;
    }
    // Lanes 0 to 15 name the pixels of a tile; the others the same under the next tap, and, for the tap that
    // is left over, of the next block.
    const T* const pixel = map + lane / 8 % 2 * kHalf + lane % 8 * kPixel;
    pairs = pixel + lane / 16 * (kStride == 1 ? 1 : kOdd) * kPixel;
    last = pixel + pixel_of(kKernel - 1) * kPixel + lane / 16 * 8;
  }

  // Adds an input row, `offset` elements behind the map: of every kStride rows the one with number `phase`.
  // With the first of them, outputs move on by one in open.
  __device__ __forceinline__ void add(int phase, int offset) {
#pragma unroll
    for (int q = 0; q <= kPairs; ++q) {
      const bool is_last = q == kPairs;
      uint32_t a[kM][kBlocks][4];  // of the last tap, a[m][b] has blocks b and b + 1, for even b
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (!is_last) {
            ldmatrix_x4(a[m][b], pairs + offset + m * (2 * kHalf) + pixel_of(2 * q) * kPixel + 8 * b);
          } else if (b % 2 == 0) {
            ldmatrix_x4(a[m][b], last + offset + m * (2 * kHalf) + 8 * b);
          }
        }
#pragma unroll
      for (int j = kOpen - 1; j >= 0; --j) {
        const int kh = j * kStride + phase;
        if (kh >= kKernel) continue;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            float before[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              before[i] = phase > 0 || q > 0 ? open[j][m][b][i] : j > 0 ? open[j - 1][m][b][i] : 0.0f;
            if (!is_last) {
              const uint32_t diagonals[2] = {taps[b][kh][2 * q], taps[b][kh][2 * q + 1]};
              mma_m16n8k16<T>(open[j][m][b], a[m][b], diagonals, before);
            } else {
              const uint32_t pixels[2] = {a[m][b / 2 * 2][b % 2 * 2], a[m][b / 2 * 2][b % 2 * 2 + 1]};
              mma_m16n8k8<T>(open[j][m][b], pixels, taps[b][kh][kKernel - 1], before);
            }
          }
      }
    }
  }
};

// BatchNorm and activation of channels 2t and 2t + 1 of kBlocks blocks. kSilu: the one activation that is
// worth a copy of the code without a switch; a quarter of the affine map is kept for it.
template <class T, int kBlocks, bool kSilu>
struct LaneEpilogue {
  float scale[kBlocks][2], shift[kBlocks][2];

  __device__ __forceinline__ LaneEpilogue(const BatchNorm& bn, int first_channel, int channels) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int c = first_channel + 8 * (i / 2) + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
      const Affine affine = c < channels ? bn_affine<T>(bn, c) : Affine{0.0f, 0.0f};
      constexpr float kFactor = affine_factor(kSilu);
      scale[i / 2][i % 2] = kFactor * affine.scale;
      shift[i / 2][i % 2] = kFactor * affine.shift;
    }
  }

  // Results of kM fragments of kBlocks.
  template <int kM>
  __device__ __forceinline__ void apply(int act, float (&z)[kM][kBlocks][4]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[m][b][i] = fmaf(z[m][b][i], scale[b][i % 2], shift[b][i % 2]);
          if constexpr (kSilu) z[m][b][i] = silu_of_quarter(z[m][b][i]);
        }
    if constexpr (!kSilu) activate<false>(act, reinterpret_cast<float (&)[kM * kBlocks * 4]>(z));
  }
};

// Four neighbouring channels of one pixel, made of two blocks' pairs: even lanes take them from the first
// block, odd ones from the second, at channel exchanged_channel() of the two blocks.
template <class T>
__device__ __forceinline__ Vec<T, 4> exchange(float a, float b, float c, float d) {
  const bool odd = threadIdx.x % 2 != 0;
  const uint32_t left = pack<T>(a, b), right = pack<T>(c, d);
  const uint32_t other = __shfl_xor_sync(kWholeWarp, odd ? left : right, 1);
  return {{odd ? other : left, odd ? right : other}};
}

__device__ __forceinline__ int exchanged_channel() {
  const int t = static_cast<int>(threadIdx.x) % 4;
  return 2 * t + t % 2 * 6;
}

// Adds up over a warp's pixels, always in this order, and stores sums[tile of the segment], if there is one,
// for those channels that there are. Lanes of the same channels exchange halves of what they have until each
// has one sum. `wanted`: bits of the channels of each segment, 2 for each block.
template <int kSegments, int kBlocks>
__device__ __forceinline__ void store_sums(float* sums, const unsigned (&tiles)[kSegments], unsigned end,
                                           int first_channel, int channels,
                                           const float (&total)[kSegments][kBlocks][2],
                                           unsigned wanted = kWholeWarp) {
  constexpr int kAll = kSegments * kBlocks * 2;
  static_assert(kAll == 4 || kAll == 8);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float of[kAll];
#pragma unroll
  for (int i = 0; i < kAll; ++i) of[i] = total[i / 2 / kBlocks][i / 2 % kBlocks][i % 2];
  int index = 0, count = kAll;  // of what this lane still has
#pragma unroll
  for (int distance = 16; distance >= 4; distance /= 2) {
    const bool upper = (lane & distance) != 0;
    if (count == 1) {
      of[0] += __shfl_xor_sync(kWholeWarp, of[0], distance);
      continue;
    }
    count /= 2;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float kept = upper ? of[i + count] : of[i], given = upper ? of[i] : of[i + count];
      of[i] = kept + __shfl_xor_sync(kWholeWarp, given, distance);
    }
    if (upper) index += count;
  }
  const bool second = index >= 2 * kBlocks;
  const unsigned tile = kSegments == 2 && second ? tiles[kSegments - 1] : tiles[0];
  const int channel = first_channel + index / 2 % kBlocks * 8 + lane % 4 * 2 + index % 2;
  const bool once = (kAll == 8 || lane % 8 < 4) && (wanted >> index % (2 * kBlocks) & 1) != 0;
  if (once && tile < end && channel < channels) sums[static_cast<int64_t>(tile) * channels + channel] = of[0];
}

// One output tap by tap, and whether its window has a value that is not finite.
struct Exact {
  float value;
  bool spoils;
};

// Zeros for what is not finite of a pair.
template <class T>
__device__ __forceinline__ uint32_t finite_or_zero(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, half> ? 0x7c00 : 0x7f80;
  const bool low = (pair & kExponent) == kExponent, high = (pair >> 16 & kExponent) == kExponent;
  return (low ? 0 : pair & 0xffff) | (high ? 0 : pair & 0xffff0000);
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// What LaneEpilogue does, for one sum.
__device__ __forceinline__ float finish(int act, float sum, Affine bn) {
  constexpr float kFactor = affine_factor(true);
  if (act == kSilu) return silu_of_quarter(fmaf(sum, kFactor * bn.scale, kFactor * bn.shift));
  return activate<false>(act, fmaf(sum, bn.scale, bn.shift));
}

// One output of a depthwise window in fp32, tap by tap. `weight`: of its channel; value(row, column): of the
// map, there.
template <int kKernel, int kStride, class T, class Value>
__device__ __forceinline__ Exact by_taps(const Window& window, int h, int w, int row, int column,
                                         const T* weight, int act, Affine bn, Value value) {
  Exact exact = {0.0f, false};
#pragma unroll 1
  for (int tap = 0; tap < kKernel * kKernel; ++tap) {
    const int x_row = row * kStride - window.top + tap / kKernel;
    const int x_column = column * kStride - window.left + tap % kKernel;
    const bool there = x_row >= 0 && x_row < h && x_column >= 0 && x_column < w;
    const float x = there ? value(x_row, x_column) : 0.0f;
    exact.value = fmaf(x, to_float(weight[tap]), exact.value);
    exact.spoils |= !is_finite(x);
  }
  exact.value = finish(act, exact.value, bn);
  return exact;
}

// The bits that any of the lanes has who share channels.
__device__ __forceinline__ unsigned of_segment(unsigned bits) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) bits |= __shfl_xor_sync(kWholeWarp, bits, distance);
  return bits;
}

// Whether one of the warp's totals is not a number.
template <int kBlocks>
__device__ __forceinline__ bool is_spoilt(const float (&total)[kBlocks][2]) {
  float all = 0;
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) all += total[i / 2][i % 2];
  return __any_sync(kWholeWarp, all != all) != 0;
}

template <class T>
__device__ __forceinline__ T* bytes_behind(T* pointer, unsigned bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

}  // namespace effnet::cuda
