// A library of kernels, seen from the Python module that steers it. They are two shared objects, because the
// thread-local storage of the first must be nothing but shared memory, and pybind11 has some of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#define CUDA_EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_EMULATION_EXPORT void cuda_emulation_set_seed(uint64_t seed);
CUDA_EMULATION_EXPORT bool cuda_emulation_set_device(int capability, int multiprocessors);
CUDA_EMULATION_EXPORT void cuda_emulation_forget_barrier(const char* file, int line);
CUDA_EMULATION_EXPORT void cuda_emulation_set_patience(double seconds);
CUDA_EMULATION_EXPORT uint64_t cuda_emulation_launches();
CUDA_EMULATION_EXPORT uint64_t cuda_emulation_switches();

// fixtures.cu: the kernel of that name, over `in` and `out`. Returns CUDA's own message where the launch
// fails.
CUDA_EMULATION_EXPORT const char* cuda_emulation_run_fixture(const char* name, const float* in, float* out,
                                                             int n, int blocks, int threads,
                                                             size_t dynamic_shared);
