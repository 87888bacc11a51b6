// The part of the CUDA runtime that launchers use. Launches are checked as CUDA checks them, and run before
// they return. Signatures are those of CUDA's cuda_runtime_api.h; what is not defined here is missing at link
// time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "scheduler.h"

// Not to be confused with the true runtime, which torch may have loaded.
#define CUDA_EMULATION_API extern "C" __attribute__((visibility("hidden"))) inline

namespace cuda_emulation {

// What a launcher can ask about a device.
struct Device {
  int capability;  // 90 for sm_90
  int multiprocessors;
  int shared_memory;  // KB of a multiprocessor; a block has at most 1 KB less
  int threads;        // of a multiprocessor
};
inline constexpr Device kDevices[] = {{80, 108, 164, 2048}, {86, 84, 100, 1536},   {89, 142, 100, 1536},
                                      {90, 132, 228, 2048}, {100, 148, 228, 2048}, {120, 170, 100, 1536}};

struct Runtime {
  Device device = kDevices[3];
  cudaError_t last_error = cudaSuccess;
  std::map<const void*, int> dynamic_shared_limit;  // of kernels that have raised it

  // False for a capability that is not in the table. With 0 multiprocessors it has as many as the product.
  bool set_device(int capability, int multiprocessors) {
    for (const Device& candidate : kDevices) {
      if (candidate.capability != capability) continue;
      device = candidate;
      if (multiprocessors > 0) device.multiprocessors = multiprocessors;
      return true;
    }
    return false;
  }
  int max_shared_memory() const { return (device.shared_memory - 1) * 1024; }
  cudaError_t report(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
  }
};
inline Runtime runtime;

inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool grid_fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff &&
                         grid.y <= 0xffff && grid.z <= 0xffff;
  const bool block_fits = block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= kMaxThreads &&
                          block.y <= kMaxThreads && block.z <= 64 &&
                          block.x * block.y * block.z <= kMaxThreads;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  const auto raised = runtime.dynamic_shared_limit.find(kernel);
  const int limit = raised == runtime.dynamic_shared_limit.end() ? 48 * 1024 : raised->second;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(limit)) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto cluster = attribute.val.clusterDim;
    if (cluster.x * cluster.y * cluster.z > 1) return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

}  // namespace cuda_emulation

// ---- launches -------------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_emulation;
  const cudaError_t error = check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return runtime.report(error);
  // Every thread gets its own copy of the parameters.
  std::pair call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  scheduler.run(
      config->gridDim, config->blockDim, config->dynamicSmemBytes,
      [](void* data) {
        auto& [kernel, parameters] = *static_cast<decltype(call)*>(data);
        std::apply(kernel, parameters);
      },
      &call);
  return cudaSuccess;
}

CUDA_EMULATION_API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                                    int value) {
  using cuda_emulation::runtime;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  if (value < 0 || value > runtime.max_shared_memory()) return runtime.report(cudaErrorInvalidValue);
  runtime.dynamic_shared_limit[kernel] = value;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Registers are not counted.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads,
                                                          std::size_t dynamic) {
  const cuda_emulation::Device& device = cuda_emulation::runtime.device;
  const int by_threads = device.threads / ((threads + 31) / 32 * 32);
  *blocks = std::min({32, by_threads, device.shared_memory * 1024 / (static_cast<int>(dynamic) + 1024)});
  return cudaSuccess;
}

// ---- errors ---------------------------------------------------------------------------------------------

CUDA_EMULATION_API cudaError_t cudaPeekAtLastError() { return cuda_emulation::runtime.last_error; }
CUDA_EMULATION_API cudaError_t cudaGetLastError() {
  return std::exchange(cuda_emulation::runtime.last_error, cudaSuccess);
}
CUDA_EMULATION_API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unrecognized error code";
  }
}

// ---- the device -----------------------------------------------------------------------------------------

CUDA_EMULATION_API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
CUDA_EMULATION_API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
CUDA_EMULATION_API cudaError_t cudaSetDevice(int device) {
  return cuda_emulation::runtime.report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
CUDA_EMULATION_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_emulation::Device& device = cuda_emulation::runtime.device;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_emulation::runtime.max_shared_memory();
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_memory * 1024;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = cuda_emulation::kMaxThreads;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = device.threads;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = 65536;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 0xffff;
      break;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      break;
    default:
      return cuda_emulation::runtime.report(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// ---- memory and streams ---------------------------------------------------------------------------------

CUDA_EMULATION_API cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}
CUDA_EMULATION_API cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                               cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
CUDA_EMULATION_API cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
CUDA_EMULATION_API cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
