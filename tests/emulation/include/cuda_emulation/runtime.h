// The CUDA runtime: devices with contexts of their own, streams, stream-ordered memory. Launches are checked
// as CUDA checks them, and run before they return, or when somebody waits for them. The functions are those
// of CUDA's cuda_runtime_api.h, in runtime_impl.h; what is not there is missing at link time.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "random.h"
#include "scheduler.h"

namespace cuda_emulation {

// What a launcher can ask about a device.
struct Device {
  int capability;  // 90 for sm_90
  int multiprocessors;
  int shared_memory;  // KB of a multiprocessor; a block has at most 1 KB less
  int threads;        // of a multiprocessor
  int max_shared_memory() const { return (shared_memory - 1) * 1024; }
};

// A kernel's __launch_bounds__; zeros where it has none.
struct LaunchBounds {
  int threads = 0, blocks = 0;
};
LaunchBounds launch_bounds_of(const void* kernel);

struct Stream {
  int device;
  std::deque<std::function<void()>> work;  // not done yet
};

class Runtime {
 public:
  static constexpr int kDevices = 6;
  Device devices[kDevices] = {{80, 108, 164, 2048}, {86, 84, 100, 1536},   {89, 142, 100, 1536},
                              {90, 132, 228, 2048}, {100, 148, 228, 2048}, {120, 170, 100, 1536}};
  std::set<int> contexts;          // devices that somebody has used
  double pause_around_limits = 0;  // seconds; other threads run meanwhile
  int driver_version = CUDART_VERSION;

  // The calling thread's; thread_local is taken for shared memory. Every library has a runtime of its own,
  // which goes by the context that is current in the thread, whoever made it so, and where none is by its own
  // number.
  int current_device();
  cudaError_t set_device(int device);
  int current_context();
  void bind_context(int device);  // -1: none
  cudaError_t report(cudaError_t error);
  cudaError_t last_error(bool forget);

  Stream* stream(int device, int number);   // makes it
  Stream* stream_of(cudaStream_t handle) {  // null: the default stream of the current device
    return handle != nullptr ? reinterpret_cast<Stream*>(handle) : stream(current_device(), 0);
  }

  cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
  cudaError_t set_limit(const void* kernel, int bytes);

  // While launches are deferred they wait in their streams until synchronize(), which takes them in an order
  // of its own: only that within a stream is kept.
  void defer(bool deferred);
  bool deferred() const { return deferred_; }
  void enqueue(cudaStream_t stream, std::function<void()> work);
  void synchronize();
  std::vector<std::pair<int, int>> waiting();  // device and number of the streams with work

  // Memory as a caching allocator gives it: who asks next on the stream may get it as soon as it is freed,
  // which shows as NaNs.
  void* allocate(std::size_t bytes, cudaStream_t stream);
  void free(void* memory);  // on the stream that it was asked for on
  void free(void* memory, cudaStream_t stream);

 private:
  std::recursive_mutex mutex_;
  struct OfThread {
    int device = 0, context = -1;
    cudaError_t last_error = cudaSuccess;
  };
  std::map<std::thread::id, OfThread> threads_;
  std::map<std::pair<int, int>, Stream> streams_;
  std::map<std::pair<const void*, int>, int> limits_;  // of dynamic shared memory, by kernel and device
  std::map<void*, std::pair<std::size_t, cudaStream_t>> memory_;
  std::vector<void*> freed_;  // kept until all is done
  bool deferred_ = false;
  Random random_;
};

extern Runtime runtime;

}  // namespace cuda_emulation

// ---- what CUDA has as templates -------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_emulation;
  const auto function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = runtime.check_launch(*config, function);
  if (error != cudaSuccess) return runtime.report(error);
  // Every thread gets its own copy of the parameters.
  std::pair call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  runtime.enqueue(config->stream, [call, function, grid = config->gridDim, block = config->blockDim,
                                   dynamic = config->dynamicSmemBytes]() mutable {
    const auto run = [](void* data) {
      auto& [kernel, parameters] = *static_cast<decltype(call)*>(data);
      std::apply(kernel, parameters);
    };
    scheduler.run(grid, block, dynamic, {function, run, &call, sizeof call});
  });
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
  using cuda_emulation::runtime;
  const cuda_emulation::Device& device = runtime.devices[runtime.current_device()];
  const int by_threads = device.threads / ((threads + 31) / 32 * 32);
  *blocks = std::min({32, by_threads, device.shared_memory * 1024 / (static_cast<int>(dynamic) + 1024)});
  return cudaSuccess;
}
