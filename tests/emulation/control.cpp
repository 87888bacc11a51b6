// Linked into every library of kernels: what tests steer from outside.
#include "control.h"

#include <cuda_runtime.h>

using namespace cuda_emulation;

void cuda_emulation_set_seed(uint64_t seed) { scheduler.set_seed(seed); }
bool cuda_emulation_set_device(int capability, int multiprocessors) {
  return runtime.set_device(capability, multiprocessors);
}
void cuda_emulation_forget_barrier(const char* file, int line) { scheduler.forget_barrier(file, line); }
void cuda_emulation_set_patience(double seconds) { scheduler.set_patience(seconds); }
uint64_t cuda_emulation_launches() { return scheduler.launches(); }
uint64_t cuda_emulation_switches() { return scheduler.switches(); }
