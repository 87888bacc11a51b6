// Shadows CUDA's file of this name, which torch's wheels do not carry: the function and variable qualifiers
// of CUDA C++, for a plain C++ compiler.
#ifndef __HOST_DEFINES_H__
#define __HOST_DEFINES_H__

#define __host__
#define __device__
#define __global__
#define __constant__
#define __managed__
#define __grid_constant__
// As many bytes of no operation stand in front of a kernel as its bounds have threads, and as many behind its
// entry as they have blocks; launch_bounds_of() counts them.
#define __launch_bounds__(...)                                                                      \
  __attribute__((patchable_function_entry(                                                          \
      ::cuda_emulation::bounds_threads(__VA_ARGS__) + ::cuda_emulation::bounds_blocks(__VA_ARGS__), \
      ::cuda_emulation::bounds_threads(__VA_ARGS__))))
namespace cuda_emulation {
constexpr int bounds_threads(int threads, int /*blocks*/ = 0, int /*of a cluster*/ = 0) { return threads; }
constexpr int bounds_blocks(int /*threads*/, int blocks = 0, int /*of a cluster*/ = 0) { return blocks; }
}  // namespace cuda_emulation
#define __maxnreg__(...)
#define __cluster_dims__(...)

// A block's memory is a variable of the thread that runs the blocks, one after another. Unlike `static` this
// may also follow `extern`, as dynamic shared memory is declared.
#define __shared__ thread_local

#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __builtin_align__(n) __align__(n)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

// What CUDA's own headers put around declarations.
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDAAPI
#define CUDA_CB
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __no_return__ __attribute__((noreturn))

#endif
