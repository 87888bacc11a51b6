// What the binding files of the CPU library share: from torch's arguments to those of the kernels, checked.
// The kernels rely on these checks; a call that passes cannot touch memory outside its tensors.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "arguments.h"
#include "cpu/common.h"

namespace effnet {

// Torch's threads for one call. Calls that run at the same time, from several threads of the program, share
// them, or there would be more threads than cores. Results do not depend on the number.
class SharedPool : public Pool {
 public:
  SharedPool() {
    threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()) / ++callers);
    run = [](int64_t n, void (*task)(void*, int64_t), void* context) {
      torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) task(context, i);
      });
    };
  }
  ~SharedPool() { --callers; }
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;

 private:
  inline static std::atomic<int> callers{0};

  // The child of a fork has only the thread that forked, and no call forks: calls that run in the parent do
  // not run in the child, and would never end there.
  inline static const int kAtFork = pthread_atfork(nullptr, nullptr, [] { callers = 0; });
};

inline SharedPool pool() { return {}; }

inline void* memory(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.data_ptr() != nullptr || t.numel() == 0, name,
                  " has no memory: its storage was released");
  return t.data_ptr();
}

inline Tensor4 tensor4(const char* name, const Tensor& t) {
  check_dim(name, t, 4);
  Tensor4 out{memory(name, t), dtype_of(name, t), {}, {}};
  for (int i = 0; i < 4; ++i) {
    out.size[i] = t.size(i);
    out.stride[i] = t.stride(i);
  }
  return out;
}

inline Tensor4 map(const char* name, const Tensor& t) {
  const Tensor4 out = tensor4(name, t);
  check_nhwc(name, t);
  return out;
}

inline float* floats(const char* name, const Tensor& t, Sizes sizes) {
  memory(name, t);
  return fp32(name, t, sizes);
}

inline Vector vector(const char* name, const Tensor& t, int64_t size) {
  check_sizes(name, t, {size});
  return {memory(name, t), dtype_of(name, t), t.stride(0)};
}

struct WindowOf {
  Window window;
  int64_t oh, ow;
};

inline WindowOf window_of(Sizes x, Sizes weight, Sizes stride, Sizes padding) {
  const auto [oh, ow] = window_result(x, weight, stride, padding);
  return {{stride[0], stride[1], padding[0], padding[2]}, oh, ow};
}

inline bool empty(const Tensor4& t) { return t.size[0] * t.size[1] * t.size[2] * t.size[3] == 0; }

}  // namespace effnet
