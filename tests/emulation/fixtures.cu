// Kernels that the emulation tests itself with: correct ones, and ones with a planted bug that must be
// caught. All compute `out`, of n elements, from `in`.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "control.h"
#include "cuda_emulation/ptx.h"

namespace fixtures {

using namespace cuda_emulation::ptx;

constexpr unsigned kAll = 0xffffffff;

// ---- reductions -----------------------------------------------------------------------------------------

// out[block] is the sum of the block's part of in.
template <bool kBarrier>
__global__ void block_sum(const float* in, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory);
  values[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) values[threadIdx.x] += values[threadIdx.x + step];
    if (kBarrier) __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = values[0];
}

// The same with shuffles; one value of each warp passes through shared memory.
__global__ void warp_sum(const float* in, float* out, int) {
  __shared__ float of_warp[32];
  float value = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0;
    for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(kAll, value, step);
    if (threadIdx.x == 0) out[blockIdx.x] = value;
  }
}

// The last block to finish adds up what all blocks have found.
__global__ void grid_sum(const float* in, float* out, int) {
  static float partial[64];
  static unsigned finished = 0;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = in[blockIdx.x];
    __threadfence();
    if (atomicInc(&finished, gridDim.x - 1) == gridDim.x - 1) {
      float sum = 0;
      for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
      *out = sum;
    }
  }
}

// When each thread ran, counted over the grid.
__global__ void order(const float*, float* out, int n) {
  static unsigned next = 0;
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(atomicInc(&next, n - 1));
}

// Lanes hand values to each other through shared memory.
template <bool kBarrier>
__global__ void warp_reverse(const float* in, float* out, int) {
  __shared__ float values[1024];
  float* warp = values + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  warp[lane] = in[threadIdx.x];
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = warp[31 - lane];
}

// Element i is how many threads before i in its warp hold a negative value; the last, how many in the block
// do.
__global__ void votes(const float* in, float* out, int n) {
  const bool negative = in[threadIdx.x] < 0;
  const unsigned ballot = __ballot_sync(kAll, negative);
  out[threadIdx.x] = static_cast<float>(__popc(ballot & ((1u << threadIdx.x % 32) - 1)));
  const int count = __syncthreads_count(negative), any = __syncthreads_or(negative),
            all = __syncthreads_and(negative);
  if (threadIdx.x == 0) out[n - 1] = static_cast<float>(count + 10000 * any + 100000 * all);
}

// Neighbours write the two halves of a word; with kSame the same half.
template <bool kSame>
__global__ void halves(const float* in, float* out, int) {
  __shared__ __align__(4) __half values[1024];
  const unsigned i = threadIdx.x;
  values[kSame ? i / 2 * 2 : i] = __half(in[i]);
  __syncthreads();
  const __half mine = values[kSame ? i / 2 * 2 : i ^ 1];
  out[i] = __half2float(mine);
}

// Everybody reads a value, which one thread then replaces.
template <bool kBarrier>
__global__ void read_then_write(const float* in, float* out, int) {
  __shared__ float value;
  if (threadIdx.x == 0) value = in[0];
  __syncthreads();
  out[threadIdx.x] = value;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 40) value = in[1];
}

// Lanes hand bytes to each other.
struct Many {
  float values[12];
};

template <bool kBarrier, bool kSet>
__global__ void reverse_bytes(const float* in, float* out, int n) {
  __shared__ Many values[64];
  const unsigned i = threadIdx.x, other = blockDim.x - 1 - i;
  Many mine{};
  const std::size_t bytes = n > 0 ? sizeof mine : 0;
  for (float& value : mine.values) value = in[i];
  if (kSet) {
    std::memset(&values[i], 0, bytes);
  } else {
    std::memcpy(&values[i], &mine, bytes);
  }
  if (kBarrier) __syncthreads();
  out[i] = values[other].values[11];
}

// The last lane returns early; the others meet without it, or in two halves.
template <unsigned kMask>
__global__ void part_of_a_warp_meets(const float* in, float* out, int) {
  __shared__ float values[32];
  const unsigned lane = threadIdx.x;
  values[lane] = in[lane];
  if (lane == 31) return;
  __syncwarp(kMask == 0 ? (lane < 16 ? 0xffffu : 0x7fff0000u) : kMask);
  out[lane] =
      values[kMask == 0 ? (lane < 30 ? lane ^ 1 : lane) : 30 - lane + (kMask == 0x7fffffffu && lane == 0)];
}

// A row of 32 values to a warp, transposed in shared memory, whose rows are kPitch values long.
template <int kPitch>
__global__ void transpose(const float* in, float* out, int) {
  __shared__ float values[32 * kPitch];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  values[lane * kPitch + warp] = in[warp * 32 + lane];
  __syncthreads();
  out[lane * 32 + warp] = values[lane * kPitch + warp];
}

// Four neighbouring values at a time.
__global__ void copy_vectors(const float* in, float* out, int) {
  __shared__ float4 values[256];
  values[threadIdx.x] = reinterpret_cast<const float4*>(in)[threadIdx.x];
  __syncthreads();
  reinterpret_cast<float4*>(out)[threadIdx.x] = values[threadIdx.x];
}

__global__ void __launch_bounds__(100, 20) odd_bounds(const float* in, float* out, int) {
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void __launch_bounds__(64) bounded(const float* in, float* out, int) {
  out[threadIdx.x] = in[threadIdx.x];
}

// ---- tensor cores and asynchronous copies ---------------------------------------------------------------

// out [16, 16] = a [16, 32] @ b [32, 16]; in is a, then b. One warp.
template <typename T>
__global__ void matrix_product(const float* in, float* out, int) {
  __shared__ __align__(16) T a[16][32];
  __shared__ __align__(16) T b[2][16][16];  // halves of k, transposed
  const int lane = threadIdx.x;
  for (int i = lane; i < 512; i += 32) {
    a[i / 32][i % 32] = T(in[i]);
    const int k = i / 256 * 16 + i % 16, n = i / 16 % 16;
    b[k / 16][n][k % 16] = T(in[512 + 16 * k + n]);
  }
  __syncwarp();
  float d[2][4] = {};
  for (int k = 0; k < 32; k += 16) {
    uint32_t of_a[4], of_b[4];
    ldmatrix_x4(of_a, &a[lane % 16][k + lane / 16 * 8]);
    ldmatrix_x4(of_b, &b[k / 16][lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    for (int half = 0; half < 2; ++half) mma_m16n8k16<T>(d[half], of_a, {of_b[2 * half], of_b[2 * half + 1]});
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i)
      out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[half][i];
}

// out[i] is the sum over k of in[k * n + i], four elements a thread, the next four on their way meanwhile.
// The last are copied in part only.
template <int kPending, bool kBarrier>
__global__ void double_buffer(const float* in, float* out, int n) {
  constexpr int kTiles = 5;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* buffers = reinterpret_cast<float*>(shared_memory);  // [2, n]
  // A thread sums what its neighbour has copied.
  const int mine = threadIdx.x * 4, neighbours = (threadIdx.x + 1) % blockDim.x * 4;
  float sums[4] = {};
  cp_async_16(buffers + mine, in + mine);
  cp_async_commit();
  for (int k = 0; k < kTiles; ++k) {
    const bool last = k + 1 == kTiles - 1;
    if (k + 1 < kTiles) cp_async_16(buffers + (k + 1) % 2 * n + mine, in + (k + 1) * n + mine, last ? 8 : 16);
    cp_async_commit();
    cp_async_wait<kPending>();
    if (kBarrier) __syncthreads();
    for (int i = 0; i < 4; ++i) sums[i] += buffers[k % 2 * n + neighbours + i];
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) out[neighbours + i] = sums[i];
}

// out[i] is three times what in has mirrored in its 64 elements: two warps exchange them, three times in the
// same memory, while the other two of the block do the same on their own. kMissing: a barrier that is not
// there; kWarps: what it is of.
template <int kMissing, int kWarps>
__global__ void teams(const float* in, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory) + threadIdx.x / 64 * 64;
  const int i = threadIdx.x % 64, id = 1 + threadIdx.x / (32 * kWarps);
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    values[i] = in[threadIdx.x];
    if (kMissing != 1) bar_sync(id, 32 * kWarps);
    sum += values[63 - i];
    if (kMissing != 2) bar_sync(id, 32 * kWarps);
  }
  out[threadIdx.x] = sum;
}

// What the first warp wrote reaches the third by way of the second, which has met both.
template <bool kSecond>
__global__ void relay(const float* in, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) values[lane] = in[lane];
  if (warp <= 1) bar_sync(1, 64);
  if (kSecond && (warp == 1 || warp == 2)) bar_sync(2, 64);
  if (warp == 2) out[lane] = values[lane];
}

// Two warps read what a third one writes when it has met both; one reads for longer than the other has met
// it.
__global__ void readers(const float*, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory);
  const int warp = threadIdx.x / 32;
  float sum = 0;
  if (warp == 0) values[threadIdx.x] = 1;
  __syncthreads();
  if (warp == 1 || warp == 2) sum += values[0];
  if (warp == 2) {
    __syncwarp();
    sum += values[0];
  }
  if (warp <= 1) bar_sync(1, 64);
  if (warp == 0 || warp == 2) bar_sync(2, 64);
  if (warp == 0) values[threadIdx.x] = 2;
  out[threadIdx.x] = sum;
}

// Two teams with one number.
__global__ void teams_of_one_number(const float*, float*, int) { bar_sync(1, 64); }

__global__ void team_of_two_sizes(const float*, float*, int) { bar_sync(1, threadIdx.x < 32 ? 64 : 96); }

__global__ void approximations(const float* in, float* out, int n) {
  n /= 3;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = ex2_approx(in[i]);
    out[n + i] = rcp_approx(in[i]);
    out[2 * n + i] = __expf(in[i]);
  }
}

// ---- planted: memory ------------------------------------------------------------------------------------

__global__ void copy(const float* in, float* out, int) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void write_outside_global(const float* in, float* out, int n) {
  if (threadIdx.x < static_cast<unsigned>(n)) out[threadIdx.x + 1] = in[threadIdx.x];
}

// The launch asks for a float for each thread.
__global__ void write_outside_dynamic_shared(const float* in, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory);
  values[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void write_outside_static_shared(const float* in, float* out, int) {
  __shared__ float values[32];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[0];
}

__global__ void read_before_write_dynamic(const float* in, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* values = reinterpret_cast<float*>(shared_memory);
  if (threadIdx.x != 5) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void read_before_write_static(const float* in, float* out, int) {
  __shared__ float values[1024];
  if (threadIdx.x != 5) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void misaligned_load(const float* in, float* out, int) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(in + threadIdx.x));
  out[threadIdx.x] = four.x;
}

__global__ void misaligned_vector(const float* in, float* out, int) {
  const float4 four = *reinterpret_cast<const float4*>(in + threadIdx.x);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

struct alignas(32) Eight {
  float values[8];
};

__global__ void misaligned_struct(const float* in, float* out, int) {
  const Eight eight = reinterpret_cast<const Eight*>(in + 1)[threadIdx.x];
  reinterpret_cast<Eight*>(out + 1)[threadIdx.x] = eight;
}

__global__ void beyond_dynamic_shared(const float* in, float* out, int) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  reinterpret_cast<float*>(shared_memory)[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0;
}

__global__ void copy_to_global(const float* in, float* out, int) { cp_async_16(out, in); }

// Lane 7 reads a lane outside of the mask.
__global__ void shuffle_from_nowhere(const float* in, float* out, int) {
  if (threadIdx.x < 8) out[threadIdx.x] = __shfl_down_sync(0xff, in[threadIdx.x], 1);
}

// ---- planted: waiting -----------------------------------------------------------------------------------

__global__ void barrier_without_some(const float*, float* out, int) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barrier_in_two_places(const float*, float* out, int) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barrier_against_warp(const float*, float* out, int) {
  if (threadIdx.x % 32 < 16)
    __syncthreads();
  else
    __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void lane_returned(const float* in, float* out, int) {
  if (threadIdx.x == 37) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
}

__global__ void mask_without_caller(const float* in, float* out, int) {
  out[threadIdx.x] = __shfl_xor_sync(0x7fffffff, in[threadIdx.x], 1);
}

__global__ void masks_differ(const float* in, float* out, int) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 < 4 ? kAll : ~1u, in[threadIdx.x], 2);
}

__global__ void half_a_warp_multiplies(const float*, float* out, int) {
  float d[4] = {};
  mma_m16n8k16<__half>(d, {0, 0, 0, 0}, {0, 0});
  out[threadIdx.x] = d[0];
}

// One thread asks until another has answered; whether any does is in[0].
__global__ void ask_until_answered(const float* in, float* out, int) {
  __shared__ int answer;
  if (threadIdx.x == 0) answer = 0;
  __syncthreads();
  if (threadIdx.x == 7) {
    while (atomicAdd(&answer, 0) == 0) {
    }
    out[0] = static_cast<float>(answer);
  } else if (threadIdx.x == 5 && in[0] > 0) {
    atomicExch(&answer, 3);
  }
}

__global__ void loop_on_a_plain_variable(const float*, float* out, int) {
  __shared__ int answer;
  const volatile int* asked = &answer;
  if (threadIdx.x == 0) answer = 0;
  __syncthreads();
  if (threadIdx.x == 3)
    while (*asked == 0) {
    }
  out[threadIdx.x] = 1;
}

// ---- the table ------------------------------------------------------------------------------------------

struct Fixture {
  const char* name;
  void (*kernel)(const float*, float*, int);
};

constexpr Fixture kFixtures[] = {
    {"block_sum", block_sum<true>},
    {"block_sum_without_barrier", block_sum<false>},
    {"warp_sum", warp_sum},
    {"grid_sum", grid_sum},
    {"order", order},
    {"warp_reverse", warp_reverse<true>},
    {"warp_reverse_without_barrier", warp_reverse<false>},
    {"votes", votes},
    {"halves", halves<false>},
    {"halves_twice", halves<true>},
    {"reverse_bytes", reverse_bytes<true, false>},
    {"reverse_bytes_without_barrier", reverse_bytes<false, false>},
    {"reverse_zeros_without_barrier", reverse_bytes<false, true>},
    {"halves_of_a_warp_meet", part_of_a_warp_meets<0>},
    {"a_lane_that_returned_is_read", part_of_a_warp_meets<0x7fffffffu>},
    {"read_then_write", read_then_write<true>},
    {"read_then_write_without_barrier", read_then_write<false>},
    {"transpose", transpose<33>},
    {"transpose_with_conflicts", transpose<32>},
    {"copy_vectors", copy_vectors},
    {"bounded", bounded},
    {"odd_bounds", odd_bounds},
    {"matrix_product_fp16", matrix_product<__half>},
    {"matrix_product_bf16", matrix_product<__nv_bfloat16>},
    {"double_buffer", double_buffer<1, true>},
    {"double_buffer_waits_for_too_little", double_buffer<2, true>},
    {"double_buffer_without_barrier", double_buffer<1, false>},
    {"teams", teams<0, 2>},
    {"teams_without_the_first_barrier", teams<1, 2>},
    {"teams_without_the_second_barrier", teams<2, 2>},
    {"teams_of_one_warp", teams<0, 1>},
    {"relay", relay<true>},
    {"relay_without_the_last", relay<false>},
    {"readers", readers},
    {"teams_of_one_number", teams_of_one_number},
    {"team_of_two_sizes", team_of_two_sizes},
    {"approximations", approximations},
    {"copy", copy},
    {"write_outside_global", write_outside_global},
    {"write_outside_dynamic_shared", write_outside_dynamic_shared},
    {"write_outside_static_shared", write_outside_static_shared},
    {"read_before_write_dynamic", read_before_write_dynamic},
    {"read_before_write_static", read_before_write_static},
    {"misaligned_load", misaligned_load},
    {"misaligned_vector", misaligned_vector},
    {"misaligned_struct", misaligned_struct},
    {"beyond_dynamic_shared", beyond_dynamic_shared},
    {"copy_to_global", copy_to_global},
    {"shuffle_from_nowhere", shuffle_from_nowhere},
    {"barrier_without_some", barrier_without_some},
    {"barrier_in_two_places", barrier_in_two_places},
    {"barrier_against_warp", barrier_against_warp},
    {"lane_returned", lane_returned},
    {"mask_without_caller", mask_without_caller},
    {"masks_differ", masks_differ},
    {"half_a_warp_multiplies", half_a_warp_multiplies},
    {"ask_until_answered", ask_until_answered},
    {"loop_on_a_plain_variable", loop_on_a_plain_variable},
};

}  // namespace fixtures

// out = in through a temporary. `freed`: after which of the two launches; `stream`: of the second one.
static cudaError_t copy_through_temporary(const float* in, float* out, int n, int freed, int stream) {
  const auto launch = [n](const float* from, float* to, int stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(n);
    config.stream = reinterpret_cast<cudaStream_t>(cuda_emulation::runtime.stream(3, stream));
    return cudaLaunchKernelEx(&config, fixtures::copy, from, to, n);
  };
  void* temporary = nullptr;
  cudaError_t error = cudaMallocAsync(&temporary, n * sizeof(float), nullptr);
  for (int i = 0; i < 2 && error == cudaSuccess; ++i) {
    const auto middle = static_cast<float*>(temporary);
    error = launch(i == 0 ? in : middle, i == 0 ? middle : out, i == 0 ? 0 : stream);
    if (i == freed) cudaFreeAsync(temporary, nullptr);
  }
  return error;
}

const char* cuda_emulation_run_fixture(const char* name, const float* in, float* out, int n, int blocks,
                                       int threads, size_t dynamic_shared) {
  for (const fixtures::Fixture& fixture : fixtures::kFixtures) {
    if (std::strcmp(fixture.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = dynamic_shared;
    cudaError_t error = cudaSuccess;
    if (dynamic_shared >= 64 * 1024)
      error = cudaFuncSetAttribute(fixture.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(dynamic_shared));
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, fixture.kernel, in, out, n);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  cudaError_t error = cudaErrorNotSupported;
  if (std::strcmp(name, "temporary") == 0) error = copy_through_temporary(in, out, n, 1, 0);
  if (std::strcmp(name, "temporary_freed_too_early") == 0) error = copy_through_temporary(in, out, n, 0, 0);
  if (std::strcmp(name, "temporary_on_another_stream") == 0) error = copy_through_temporary(in, out, n, 1, 1);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
