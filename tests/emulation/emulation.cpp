// Linked into every library of kernels: the emulation itself, and what tests steer from outside.
#include <cuda_runtime.h>

#include "control.h"
#include "cuda_emulation/accesses_impl.h"
#include "cuda_emulation/runtime_impl.h"
#include "cuda_emulation/scheduler_impl.h"

using namespace cuda_emulation;

void cuda_emulation_set_seed(uint64_t seed) { scheduler.set_seed(seed); }
void cuda_emulation_set_natural_order(bool natural) { scheduler.set_natural_order(natural); }
void cuda_emulation_forget_barrier(const char* file, int line) { scheduler.forget_barrier(file, line); }
void cuda_emulation_set_patience(double seconds) { scheduler.set_patience(seconds); }
uint64_t cuda_emulation_launches() { return scheduler.launches(); }
uint64_t cuda_emulation_switches() { return scheduler.switches(); }

int cuda_emulation_find_device(int capability, int multiprocessors) {
  for (int i = 0; i < Runtime::kDevices; ++i) {
    if (runtime.devices[i].capability != capability) continue;
    runtime.devices[i].multiprocessors =
        multiprocessors > 0 ? multiprocessors : Runtime().devices[i].multiprocessors;
    return i;
  }
  return -1;
}
void cuda_emulation_choose_device(int device) { runtime.set_device(device); }
int cuda_emulation_current_device() { return runtime.current_device(); }
void cuda_emulation_pop_context() { runtime.bind_context(-1); }
uint64_t cuda_emulation_contexts() {
  uint64_t bits = 0;
  for (const int device : runtime.contexts) bits |= uint64_t{1} << device;
  return bits;
}
void cuda_emulation_forget_contexts() { runtime.contexts.clear(); }
void cuda_emulation_set_pause(double seconds) { runtime.pause_around_limits = seconds; }
void cuda_emulation_defer(bool deferred) { runtime.defer(deferred); }
bool cuda_emulation_deferred() { return runtime.deferred(); }
void cuda_emulation_synchronize() { runtime.synchronize(); }
void cuda_emulation_waiting(void (*visit)(int device, int stream, void*), void* data) {
  for (const auto& [device, stream] : runtime.waiting()) visit(device, stream, data);
}

void cuda_emulation_count(bool counting) { accesses.count(counting); }
void cuda_emulation_costs(void (*visit)(const Cost&, void*), void* data) {
  for (const Cost& cost : accesses.costs()) visit(cost, data);
}
void cuda_emulation_launch_bounds(uint64_t address, int* threads, int* blocks) {
  const LaunchBounds bounds = launch_bounds_of(__ehdr_start + address);
  *threads = bounds.threads, *blocks = bounds.blocks;
}
