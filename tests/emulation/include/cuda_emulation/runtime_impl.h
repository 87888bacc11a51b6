// Included by emulation.cpp.
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

// Made by the linker: where the compiler has put bytes of no operation in front of a function.
CUDA_EMULATION_HIDDEN __attribute__((weak)) const unsigned char* const __start___patchable_function_entries[];
CUDA_EMULATION_HIDDEN __attribute__((weak)) const unsigned char* const __stop___patchable_function_entries[];

namespace cuda_emulation {

Runtime runtime;

LaunchBounds launch_bounds_of(const void* kernel) {
  const auto* entry = static_cast<const unsigned char*>(kernel);
  const unsigned char* first = nullptr;  // of those in front of it
  for (auto i = __start___patchable_function_entries; i != __stop___patchable_function_entries; ++i)
    if (*i <= entry && *i > first) first = *i;
  LaunchBounds bounds;
  for (; first != nullptr && first != entry; ++first, ++bounds.threads)
    if (*first != 0x90) return {};  // they are another function's
  while (bounds.threads > 0 && *entry++ == 0x90) ++bounds.blocks;
  return bounds;
}

// ---- threads, devices ----------------------------------------------------------------------------------

int Runtime::current_device() {
  const std::lock_guard lock(mutex_);
  const OfThread& thread = threads_[std::this_thread::get_id()];
  return thread.context >= 0 ? thread.context : thread.device;
}

// Since CUDA 12 it makes the device's context.
cudaError_t Runtime::set_device(int device) {
  const std::lock_guard lock(mutex_);
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  threads_[std::this_thread::get_id()].device = device;
  bind_context(device);
  return cudaSuccess;
}

int Runtime::current_context() {
  const std::lock_guard lock(mutex_);
  return threads_[std::this_thread::get_id()].context;
}

void Runtime::bind_context(int device) {
  const std::lock_guard lock(mutex_);
  threads_[std::this_thread::get_id()].context = device;
  if (device >= 0) contexts.insert(device);
}

cudaError_t Runtime::report(cudaError_t error) {
  const std::lock_guard lock(mutex_);
  if (error != cudaSuccess) threads_[std::this_thread::get_id()].last_error = error;
  return error;
}

cudaError_t Runtime::last_error(bool forget) {
  const std::lock_guard lock(mutex_);
  cudaError_t& error = threads_[std::this_thread::get_id()].last_error;
  return forget ? std::exchange(error, cudaSuccess) : error;
}

cudaError_t Runtime::set_limit(const void* kernel, int bytes) {
  const auto pause = [this] {
    if (pause_around_limits > 0)
      std::this_thread::sleep_for(std::chrono::duration<double>(pause_around_limits));
  };
  pause();
  {
    const std::lock_guard lock(mutex_);
    const int device = current_device();
    bind_context(device);
    if (bytes < 0 || bytes > devices[device].max_shared_memory()) return cudaErrorInvalidValue;
    limits_[{kernel, device}] = bytes;
  }
  pause();
  return cudaSuccess;
}

cudaError_t Runtime::check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const std::lock_guard lock(mutex_);
  const int device = current_device();
  bind_context(device);
  if (stream_of(config.stream)->device != device) return cudaErrorInvalidResourceHandle;
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool grid_fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff &&
                         grid.y <= 0xffff && grid.z <= 0xffff;
  const bool block_fits = block.x >= 1 && block.y >= 1 && block.z >= 1 && block.x <= kMaxThreads &&
                          block.y <= kMaxThreads && block.z <= 64 &&
                          block.x * block.y * block.z <= kMaxThreads;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  const int bound = launch_bounds_of(kernel).threads;
  if (bound > 0 && static_cast<int>(block.x * block.y * block.z) > bound) return cudaErrorInvalidValue;
  const auto raised = limits_.find({kernel, device});
  const int limit = raised == limits_.end() ? 48 * 1024 : raised->second;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(limit)) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto cluster = attribute.val.clusterDim;
    if (cluster.x * cluster.y * cluster.z > 1) return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

// ---- streams and memory --------------------------------------------------------------------------------

Stream* Runtime::stream(int device, int number) {
  const std::lock_guard lock(mutex_);
  Stream& stream = streams_[{device, number}];
  stream.device = device;
  return &stream;
}

void Runtime::defer(bool deferred) {
  deferred_ = deferred;
  if (!deferred) synchronize();
}

void Runtime::enqueue(cudaStream_t stream, std::function<void()> work) {
  if (!deferred_) return work();
  const std::lock_guard lock(mutex_);
  stream_of(stream)->work.push_back(std::move(work));
}

void Runtime::synchronize() {
  random_ = Random(scheduler.seed());
  // The first of what a stream has to do; nothing where all have done.
  const auto next = [this]() -> std::function<void()> {
    const std::lock_guard lock(mutex_);
    std::vector<Stream*> busy;
    for (auto& [key, stream] : streams_)
      if (!stream.work.empty()) busy.push_back(&stream);
    if (busy.empty()) return nullptr;
    auto& work = busy[random_.below(static_cast<std::uint32_t>(busy.size()))]->work;
    std::function<void()> first = std::move(work.front());
    work.pop_front();
    return first;
  };
  const auto release = [this] {
    const std::lock_guard lock(mutex_);
    for (auto& [key, stream] : streams_) stream.work.clear();
    for (void* memory : freed_) std::free(memory);
    freed_.clear();
  };
  try {
    while (const std::function<void()> work = next()) work();
  } catch (...) {
    release();
    throw;
  }
  release();
}

std::vector<std::pair<int, int>> Runtime::waiting() {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<int, int>> found;
  for (const auto& [key, stream] : streams_)
    if (!stream.work.empty()) found.push_back(key);
  return found;
}

void* Runtime::allocate(std::size_t bytes, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes) != 0) return nullptr;
  std::memset(memory, 0xff, bytes);
  memory_[memory] = {bytes, stream};
  return memory;
}

void Runtime::free(void* memory) {
  const std::lock_guard lock(mutex_);
  free(memory, memory_.at(memory).second);
}

void Runtime::free(void* memory, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  const std::size_t bytes = memory_.at(memory).first;
  memory_.erase(memory);
  freed_.push_back(memory);
  enqueue(stream, [memory, bytes] { std::memset(memory, 0xff, bytes); });
  if (!deferred_) synchronize();
}

}  // namespace cuda_emulation

// ---- CUDA's functions ----------------------------------------------------------------------------------

namespace cuda_emulation {
static void use_current_device() { runtime.bind_context(runtime.current_device()); }
}  // namespace cuda_emulation

// Hidden: torch may have loaded the true runtime.
CUDA_EMULATION_HIDDEN cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                                       int value) {
  using cuda_emulation::runtime;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  return runtime.report(runtime.set_limit(kernel, value));
}

CUDA_EMULATION_HIDDEN cudaError_t cudaPeekAtLastError() { return cuda_emulation::runtime.last_error(false); }
CUDA_EMULATION_HIDDEN cudaError_t cudaGetLastError() { return cuda_emulation::runtime.last_error(true); }
CUDA_EMULATION_HIDDEN const char* cudaGetErrorString(cudaError_t error) {
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
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unrecognized error code";
  }
}

CUDA_EMULATION_HIDDEN cudaError_t cudaDriverGetVersion(int* version) {
  return *version = cuda_emulation::runtime.driver_version, cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaGetDeviceCount(int* count) {
  return *count = cuda_emulation::Runtime::kDevices, cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaGetDevice(int* device) {
  return *device = cuda_emulation::runtime.current_device(), cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaSetDevice(int device) {
  return cuda_emulation::runtime.report(cuda_emulation::runtime.set_device(device));
}
CUDA_EMULATION_HIDDEN cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  using cuda_emulation::runtime;
  if (number < 0 || number >= cuda_emulation::Runtime::kDevices)
    return runtime.report(cudaErrorInvalidDevice);
  const cuda_emulation::Device& device = runtime.devices[number];
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
      *value = device.max_shared_memory();
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
      return runtime.report(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

CUDA_EMULATION_HIDDEN cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t stream) {
  cuda_emulation::use_current_device();
  *pointer = cuda_emulation::runtime.allocate(bytes, stream);
  return cuda_emulation::runtime.report(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
CUDA_EMULATION_HIDDEN cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  cuda_emulation::use_current_device();
  return cuda_emulation::runtime.free(pointer, stream), cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes,
                                                  cudaStream_t stream) {
  cuda_emulation::use_current_device();
  cuda_emulation::runtime.enqueue(stream, [=] { std::memset(pointer, value, bytes); });
  return cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                                  cudaMemcpyKind, cudaStream_t stream) {
  cuda_emulation::use_current_device();
  cuda_emulation::runtime.enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cuda_emulation::use_current_device();
  return cuda_emulation::runtime.synchronize(), cudaSuccess;
}
CUDA_EMULATION_HIDDEN cudaError_t cudaDeviceSynchronize() {
  cuda_emulation::use_current_device();
  return cuda_emulation::runtime.synchronize(), cudaSuccess;
}
