// A library of kernels, seen from the Python module that steers it. They are two shared objects, because the
// thread-local storage of the first must be nothing but shared memory, and pybind11 has some of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulation/accesses.h"

#define CUDA_EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_EMULATION_EXPORT void cuda_emulation_set_seed(uint64_t seed);
CUDA_EMULATION_EXPORT void cuda_emulation_set_natural_order(bool natural);
CUDA_EMULATION_EXPORT void cuda_emulation_forget_barrier(const char* file, int line);
CUDA_EMULATION_EXPORT void cuda_emulation_set_patience(double seconds);
CUDA_EMULATION_EXPORT uint64_t cuda_emulation_launches();
CUDA_EMULATION_EXPORT uint64_t cuda_emulation_switches();

// The number of the device with this capability, -1 where there is none. With 0 multiprocessors it has as
// many as the product.
CUDA_EMULATION_EXPORT int cuda_emulation_find_device(int capability, int multiprocessors);
CUDA_EMULATION_EXPORT void cuda_emulation_choose_device(int device);
CUDA_EMULATION_EXPORT int cuda_emulation_current_device();
CUDA_EMULATION_EXPORT void cuda_emulation_pop_context();
CUDA_EMULATION_EXPORT uint64_t cuda_emulation_contexts();  // bit i: device i has one
CUDA_EMULATION_EXPORT void cuda_emulation_forget_contexts();
CUDA_EMULATION_EXPORT void cuda_emulation_set_pause(double seconds);
CUDA_EMULATION_EXPORT void cuda_emulation_defer(bool deferred);
CUDA_EMULATION_EXPORT bool cuda_emulation_deferred();
CUDA_EMULATION_EXPORT void cuda_emulation_synchronize();
CUDA_EMULATION_EXPORT void cuda_emulation_waiting(void (*visit)(int device, int stream, void*), void* data);

CUDA_EMULATION_EXPORT void cuda_emulation_count(bool counting);
CUDA_EMULATION_EXPORT void cuda_emulation_costs(void (*visit)(const cuda_emulation::Cost&, void*),
                                                void* data);
// Of the function at that address in the library; zeros where it has none.
CUDA_EMULATION_EXPORT void cuda_emulation_launch_bounds(uint64_t address, int* threads, int* blocks);

// torch.cpp: the calling thread's stream on a device, and torch's view of the thread's current device.
CUDA_EMULATION_EXPORT void cuda_emulation_set_torch_stream(int device, int stream);
CUDA_EMULATION_EXPORT int cuda_emulation_torch_device();
CUDA_EMULATION_EXPORT void cuda_emulation_set_torch_device(int device);

// fixtures.cu: the kernel of that name, over `in` and `out`. Returns CUDA's own message where the launch
// fails.
CUDA_EMULATION_EXPORT const char* cuda_emulation_run_fixture(const char* name, const float* in, float* out,
                                                             int n, int blocks, int threads,
                                                             size_t dynamic_shared);
