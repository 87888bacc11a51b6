// What all CUDA kernels share: dtypes, vectors of 16 bytes, BatchNorm, activations, the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/api.h"
#include "cuda/ptx.cuh"

namespace effnet {

template <>
inline constexpr DType kDTypeOf<__nv_bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::kFloat16;

}  // namespace effnet

namespace effnet::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

template <class T>
constexpr bool kIs16Bit = sizeof(T) == 2;

// Elements in 16 bytes: the channels that one load of a thread brings.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// ---- conversions -----------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest even; fp16 overflows to infinity as stock layers do.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// The bits of one value as another type of the same size.
template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Two neighbours packed in 32 bits, the first in the low half, as two floats.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, half>) {
    return __half22float2(bit_cast<__half2>(pair));
  } else {  // bf16 is the upper half of an fp32
    return {bit_cast<float>(pair << 16), bit_cast<float>(pair & 0xffff0000u)};
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, half>) {
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  } else {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  }
}

// kCount elements of T in registers, as loaded: 4, 8 or 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  uint32_t words[sizeof(T) * kCount / 4];

  static __device__ __forceinline__ Vec zero() { return Vec{}; }

  // `from` is aligned to the size of the vector.
  static __device__ __forceinline__ Vec load(const T* from) { return *reinterpret_cast<const Vec*>(from); }

  // For data that nothing writes while the kernel runs.
  static __device__ __forceinline__ Vec load_constant(const T* from) {
#if defined(__CUDA_ARCH__)
    Vec out;
    if constexpr (sizeof(Vec) == 16) {
      out = bit_cast<Vec>(__ldg(reinterpret_cast<const uint4*>(from)));
    } else if constexpr (sizeof(Vec) == 8) {
      out = bit_cast<Vec>(__ldg(reinterpret_cast<const uint2*>(from)));
    } else {
      out = bit_cast<Vec>(__ldg(reinterpret_cast<const uint32_t*>(from)));
    }
    return out;
#else
    return load(from);
#endif
  }

  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Vec*>(to) = *this; }

  __device__ __forceinline__ void to_floats(float (&out)[kCount]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = bit_cast<float>(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float2 pair = unpack<T>(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }

  static __device__ __forceinline__ Vec from_floats(const float (&in)[kCount]) {
    Vec out;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out.words[i] = bit_cast<uint32_t>(in[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) out.words[i] = pack<T>(in[2 * i], in[2 * i + 1]);
    }
    return out;
  }
};

// One element: for maps whose channels are no multiple of a vector, or whose memory is not aligned to one.
template <class T>
struct Vec<T, 1> {
  T value;

  static __device__ __forceinline__ Vec zero() { return {from_float<T>(0.0f)}; }
  static __device__ __forceinline__ Vec load(const T* from) { return {*from}; }
  static __device__ __forceinline__ Vec load_constant(const T* from) { return {*from}; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void to_floats(float (&out)[1]) const { out[0] = to_float(value); }
  static __device__ __forceinline__ Vec from_floats(const float (&in)[1]) { return {from_float<T>(in[0])}; }
};

// Element i of a parameter that is fp32 or T.
template <class T>
__device__ __forceinline__ float load_param(const Param& p, int64_t i) {
  if (p.is_fp32) return static_cast<const float*>(p.data)[i];
  return to_float(static_cast<const T*>(p.data)[i]);
}

// ---- epilogues -------------------------------------------------------------------------------------------

// BatchNorm of one channel as y * scale + shift.
struct Affine {
  float scale, shift;
};

template <class T>
__device__ __forceinline__ Affine bn_affine(const BatchNorm& bn, int channel) {
  float gamma, beta, mean, var;
  if (bn.gamma.is_fp32 && bn.beta.is_fp32 && bn.mean.is_fp32 &&
      bn.var.is_fp32) {  // all loads under way at once
    gamma = static_cast<const float*>(bn.gamma.data)[channel];
    beta = static_cast<const float*>(bn.beta.data)[channel];
    mean = static_cast<const float*>(bn.mean.data)[channel];
    var = static_cast<const float*>(bn.var.data)[channel];
  } else {
    gamma = load_param<T>(bn.gamma, channel);
    beta = load_param<T>(bn.beta, channel);
    mean = load_param<T>(bn.mean, channel);
    var = load_param<T>(bn.var, channel);
  }
  const float scale = gamma / sqrtf(var + bn.eps);
  return {scale, beta - mean * scale};
}

// Minimum and maximum that keep a NaN, as torch's clamp does.
__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }

// 1 / (1 + exp(-x)). Divided by 4 until the end, so that the approximate reciprocal, within 1 ulp, stays a
// normal number up to where exp(-x) overflows, in stock layers too. For a 16-bit result the exponential is an
// approximation as well, within 2 ulp near zero. (One tanh.approx would do for both, but with 2^-11 relative
// error 1 + tanh(x / 2) has no correct digit left at x = -8, and stock has all of them.)
template <bool kExact>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (kExact) return 0.25f * rcp_approx(fmaf(expf(-x), 0.25f, 0.25f));
  return 0.25f * rcp_approx(ex2_approx(fmaf(x, -1.4426950408889634f, -2.0f)) + 0.25f);
}

// Activation number `act` of ops/activations.py. `act` is the same for the whole grid: the switch does not
// diverge.
template <bool kExact>
__device__ __forceinline__ float activate(int act, float x) {
  switch (act) {
    case kRelu:
      return at_least(x, 0.0f);
    case kRelu6:
      return at_most(at_least(x, 0.0f), 6.0f);
    case kSilu:
      return x * sigmoid<kExact>(x);
    case kHardswish:
      return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    case kSigmoid:
      return sigmoid<kExact>(x);
    case kHardsigmoid:
      return at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    default:
      return x;
  }
}

// The same for an array: one switch for all of it.
template <bool kExact, int kCount>
__device__ __forceinline__ void activate(int act, float (&x)[kCount]) {
  const auto each = [&x](auto code) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = activate<kExact>(decltype(code)::value, x[i]);
  };
  switch (act) {
    case kRelu:
      return each(std::integral_constant<int, kRelu>());
    case kRelu6:
      return each(std::integral_constant<int, kRelu6>());
    case kSilu:
      return each(std::integral_constant<int, kSilu>());
    case kHardswish:
      return each(std::integral_constant<int, kHardswish>());
    case kSigmoid:
      return each(std::integral_constant<int, kSigmoid>());
    case kHardsigmoid:
      return each(std::integral_constant<int, kHardsigmoid>());
    default:
      return;
  }
}

// For 16-bit results SiLU(x) is computed from x / 4. The division is a part of the BatchNorm before it: that
// has its scale and shift times affine_factor.
__device__ __forceinline__ float silu_of_quarter(float quarter) {
  return quarter * rcp_approx(ex2_approx(fmaf(quarter, -4 * 1.4426950408889634f, -2.0f)) + 0.25f);
}

__device__ __forceinline__ constexpr float affine_factor(bool silu) { return silu ? 0.25f : 1.0f; }

// ---- host code -------------------------------------------------------------------------------------------

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

using effnet::with_type;

template <class F>
auto with_type(DType dtype, F&& f) {
  return with_type<float, half, bf16>(dtype, f);
}

// What the depthwise kernels are compiled for.
inline Status check_window(const Window& window) {
  if (window.kh != window.kw || (window.kh != 3 && window.kh != 5 && window.kh != 7)) {
    return {cudaErrorInvalidValue, "weight must be 3x3, 5x5 or 7x7"};
  }
  if (window.stride_h != window.stride_w || (window.stride_h != 1 && window.stride_h != 2)) {
    return {cudaErrorInvalidValue, "stride must be 1 or 2, the same both ways"};
  }
  return {};
}

// Calls f(kernel size, stride), both as types, for a window that has been checked.
template <class F>
auto with_window(const Window& window, F&& f) {
  const auto with_stride = [&](auto kernel) {
    return window.stride_h == 1 ? f(kernel, std::integral_constant<int, 1>())
                                : f(kernel, std::integral_constant<int, 2>());
  };
  switch (window.kh) {
    case 3:
      return with_stride(std::integral_constant<int, 3>());
    case 5:
      return with_stride(std::integral_constant<int, 5>());
    default:
      return with_stride(std::integral_constant<int, 7>());
  }
}

// Calls f(T(), kernel size, stride) for a T of those listed.
template <class... Types, class F>
auto with_window(DType dtype, const Window& window, F&& f) {
  return with_type<Types...>(dtype, [&](auto element) {
    return with_window(window, [&](auto kernel, auto stride) { return f(element, kernel, stride); });
  });
}

// Those of the current device.
inline cudaError_t count_multiprocessors(int& multiprocessors) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

// Allows blocks of a kernel, which has no static shared memory, all that the current device has: always the
// same value, so that no other thread's launch is in the way.
template <auto kKernel>
cudaError_t allow_all_shared_memory() {
  static std::atomic<uint64_t> done{0};  // bit i: on device i; beyond 63 it is done anew at every launch
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error != cudaSuccess || (done.load(std::memory_order_acquire) & bit) != 0) return error;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

// Enqueues kernel<<<grid, threads, shared_bytes, stream>>>(params). Up to 48 KB of dynamic shared memory need
// no leave.
template <auto kKernel, class Params>
Status launch(dim3 grid, int threads, int shared_bytes, cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = allow_all_shared_memory<kKernel>();
    if (error != cudaSuccess) return {error, nullptr};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return {cudaLaunchKernelEx(&config, kKernel, params), nullptr};
}

// The same for `blocks` in a row.
template <auto kKernel, class Params>
Status launch(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream, const Params& params) {
  if (blocks > INT32_MAX) return {cudaErrorInvalidValue, "the map has too many elements for one launch"};
  return launch<kKernel>(dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream, params);
}

}  // namespace effnet::cuda
